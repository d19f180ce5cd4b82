"""CLIP's encoders under transformers' names: `CLIPTextModel`, `CLIPVisionModel`, and both with a projection.

Published files name the layers "text_model.encoder.layers.0 ..."; transformers 5 writes `CLIPTextModel` and
`CLIPVisionModel`, which have no projection, without that first part. A table reads the one or the other, as the names
of the tensors say; we write the published names, which all versions read.
"""

from collections.abc import Collection, Mapping
from typing import Any

import jax.numpy as jnp

from ldm_jax.models import clip
from ldm_jax.weights import configs
from ldm_jax.weights.table import Row, Table, under

# Numbers 0, 1, 2 ... that older versions stored with the weights: an `ignore` of `table.load`.
IGNORED = (r"(.*\.)?position_ids",)

LAYERS = under(
    "layer_{i}",
    "encoder.layers.{i}",
    (
        Row("norm_attn", "layer_norm1"),
        Row("attn/out", "self_attn.out_proj"),
        Row("attn/{qkv}", "self_attn.{qkv}_proj"),
        Row("norm_ff", "layer_norm2"),
        Row("ff_in", "mlp.fc1"),
        Row("ff_out", "mlp.fc2"),
    ),
)
TEXT = (
    Row("token", "embeddings.token_embedding"),
    Row("position", "embeddings.position_embedding.weight"),
    *LAYERS,
    Row("norm", "final_layer_norm"),
)
VISION = (
    Row("class", "embeddings.class_embedding"),
    Row("position", "embeddings.position_embedding.weight"),
    Row("patch", "embeddings.patch_embedding"),
    Row("norm_in", "pre_layrnorm"),  # sic
    *LAYERS,
    Row("norm", "post_layernorm"),
)


def text_table(names: Collection[str] = ()) -> Table:
    """`models.clip.TextEncoder`; `names` are those of the tensors to read, none to write."""
    return (*_placed(TEXT, "text_model", names), Row("projection", "text_projection"))


def vision_table(names: Collection[str] = ()) -> Table:
    """`models.clip.VisionEncoder`; `names` are those of the tensors to read, none to write."""
    return (*_placed(VISION, "vision_model", names), Row("projection", "visual_projection"))


def _placed(rows: Table, prefix: str, names: Collection[str]) -> Table:
    if "embeddings.position_embedding.weight" in names:
        return rows
    return tuple(row._replace(theirs=f"{prefix}.{row.theirs}") for row in rows)


SHARED = dict(
    architectures=(),
    hidden_size=512,
    intermediate_size=2048,
    num_hidden_layers=12,
    num_attention_heads=8,
    hidden_act="quick_gelu",
    layer_norm_eps=1e-5,
    projection_dim=512,
)
ONLY = dict(
    hidden_act=("quick_gelu", "gelu"),
    attention_dropout=(0, None),
    dropout=(0, None),
    model_type=("clip_text_model", "clip_vision_model"),
)
IDLE = (
    "bos_token_id",
    "dtype",
    "initializer_factor",
    "initializer_range",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_return_dict",
)


def text_from_config(config: Mapping[str, Any], dtype: Any = jnp.float32) -> clip.TextEncoder:
    """The encoder that the `config.json` of a text encoder describes.

    Raises:
      ValueError: neither of the two text models, or settings that we lack.
    """
    takes = SHARED | dict(vocab_size=49408, max_position_embeddings=77, eos_token_id=49407)
    read = configs.read(config, "CLIP text encoder", takes, ONLY, IDLE)
    eos = read["eos_token_id"]
    if not isinstance(eos, int):
        raise ValueError(f"the config has eos_token_id={eos!r}; one number was expected")
    return clip.TextEncoder(
        vocab=read["vocab_size"],
        length=read["max_position_embeddings"],
        eos=None if eos == 2 else eos,  # see TextEncoder
        dtype=dtype,
        **_common(read, "CLIPTextModel"),
    )


def vision_from_config(config: Mapping[str, Any], dtype: Any = jnp.float32) -> clip.VisionEncoder:
    """The encoder that the `config.json` of an image encoder describes.

    Raises:
      ValueError: neither of the two vision models, or settings that we lack.
    """
    takes = SHARED | dict(
        hidden_size=768,
        intermediate_size=3072,
        num_attention_heads=12,
        image_size=224,
        patch_size=32,
    )
    only = ONLY | dict(num_channels=(3,))
    read = configs.read(config, "CLIP vision encoder", takes, only, IDLE)
    for key in ("image_size", "patch_size"):
        if not isinstance(read[key], int):
            raise ValueError(
                f"the config has {key}={read[key]!r}; one number for both axes is needed"
            )
    return clip.VisionEncoder(
        size=read["image_size"],
        patch=read["patch_size"],
        dtype=dtype,
        **_common(read, "CLIPVisionModel"),
    )


def _common(read: Mapping[str, Any], name: str) -> dict[str, Any]:
    architectures = read["architectures"]
    if architectures not in ((name,), (f"{name}WithProjection",)):
        raise ValueError(
            f"the config has architectures={architectures!r}; it must name {name!r} or "
            f"'{name}WithProjection', which says whether there is a projection"
        )
    return dict(
        width=read["hidden_size"],
        hidden=read["intermediate_size"],
        layers=read["num_hidden_layers"],
        heads=read["num_attention_heads"],
        activation=read["hidden_act"],
        eps=read["layer_norm_eps"],
        projection=None if architectures == (name,) else read["projection_dim"],
    )


def text_to_config(module: clip.TextEncoder) -> dict[str, Any]:
    """The `config.json` from which transformers builds the same text encoder.

    Raises:
      ValueError: `eos` is 2, which transformers reads as "the largest id".
    """
    if module.eos == 2:
        raise ValueError("eos=2 means the largest id to transformers; give the end another id")
    return _shared(module, "CLIPTextModel", "clip_text_model") | dict(
        vocab_size=module.vocab,
        max_position_embeddings=module.length,
        eos_token_id=2 if module.eos is None else module.eos,
    )


def vision_to_config(module: clip.VisionEncoder) -> dict[str, Any]:
    """The `config.json` from which transformers builds the same vision encoder."""
    return _shared(module, "CLIPVisionModel", "clip_vision_model") | dict(
        image_size=module.size, patch_size=module.patch, num_channels=3
    )


def _shared(module: clip.TextEncoder | clip.VisionEncoder, name: str, kind: str) -> dict[str, Any]:
    found = dict(
        architectures=[name if module.projection is None else f"{name}WithProjection"],
        model_type=kind,
        hidden_size=module.width,
        intermediate_size=module.hidden,
        num_hidden_layers=module.layers,
        num_attention_heads=module.heads,
        hidden_act=module.activation,
        layer_norm_eps=module.eps,
    )
    return found if module.projection is None else found | dict(projection_dim=module.projection)
