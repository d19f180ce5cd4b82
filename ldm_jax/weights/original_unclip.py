"""What Stable unCLIP's original files have beside a Stable Diffusion 2: an image encoder, and statistics of embeddings.

The encoder is the whole of CLIP, of which the image tower is read, in the layout that OpenAI's code and open_clip have
in common. The mean and deviation of its embeddings are no tensors of the published files: with ViT-H there are none (0
and 1), with ViT-L they lie in a file of their own; such a model loads only where they are beside the weights, as we
write them.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ldm_jax.weights import original
from ldm_jax.weights.original_noise import EMBEDDINGS
from ldm_jax.weights.table import Row, Table

VISUAL = "embedder.model.visual."
# The tower's text half, and buffers.
BESIDE = (r"embedder\.(?!model\.visual\.).*", r"noise_augmentor\.(?!data_(mean|std)$).*")
OPENAI_WIDTH = 1024  # of ViT-L, which has OpenAI's activation; open_clip's have gelu
PROCESSOR = dict(
    image_processor_type="CLIPImageProcessor",
    size={"shortest_edge": 224},
    crop_size={"height": 224, "width": 224},
)


class Parts(NamedTuple):
    """Component -> its config, or what of its tensors is known without the file."""

    configs: dict[str, dict[str, Any]]
    made: dict[str, dict[str, np.ndarray]]


def inside(tensors: Mapping[str, Any]) -> bool:
    return f"{VISUAL}conv1.weight" in tensors


def vision(prefix: str = VISUAL) -> Table:
    """`models.clip.VisionEncoder`."""
    rows = (
        Row("class", "class_embedding"),
        Row("position", "positional_embedding"),
        Row("patch", "conv1"),
        Row("norm_in", "ln_pre"),
        *original.OPEN_CLIP_LAYERS,
        Row("norm", "ln_post"),
        Row("projection/kernel", "proj", original.KEPT),
    )
    return tuple(row._replace(theirs=prefix + row.theirs) for row in rows)


def normalizer(prefix: str = EMBEDDINGS) -> Table:
    """`models.unclip.Normalizer`, as a file of their code would have it if its buffers were kept."""
    return (Row("mean", f"{prefix}data_mean"), Row("std", f"{prefix}data_std"))


def recognise(tensors: Mapping[str, Any], asked: Mapping[str, Mapping[str, Any]] = {}) -> Parts:
    """The encoder from its shapes; `asked` are settings, by component, that go before them.

    Raises:
      ValueError: an encoder of ViT-L without statistics.
    """
    shapes = {
        name.removeprefix(VISUAL): tuple(tensors[name].shape)
        for name in tensors
        if name.startswith(VISUAL)
    }
    width, _, patch, _ = shapes["conv1.weight"]
    dim = shapes["proj"][1]
    openai = width == OPENAI_WIDTH
    encoder = dict(
        architectures=["CLIPVisionModelWithProjection"],
        model_type="clip_vision_model",
        hidden_size=width,
        intermediate_size=shapes["transformer.resblocks.0.mlp.c_fc.weight"][0],
        num_hidden_layers=sum(name.endswith(".ln_1.weight") for name in shapes),
        num_attention_heads=16,  # of ViT-L, H and bigG
        hidden_act="quick_gelu" if openai else "gelu",
        image_size=patch * round((shapes["positional_embedding"][0] - 1) ** 0.5),
        patch_size=patch,
        projection_dim=dim,
    )
    configs = {
        "image_encoder": encoder | asked.get("image_encoder", {}),
        "image_normalizer": {"_class_name": "StableUnCLIPImageNormalizer", "embedding_dim": dim},
    }
    if f"{EMBEDDINGS}data_mean" in tensors:
        return Parts(configs, {})
    if openai:
        raise ValueError(
            "the file has the image encoder ViT-L and lacks the mean and deviation of its embeddings, which are "
            "published apart; load the folder of diffusers"
        )
    zeros, ones = (np.full((1, dim), x, np.float32) for x in (0, 1))
    return Parts(configs, {"image_normalizer": {"mean": zeros, "std": ones}})


def tables(component: str) -> Table:
    return {"image_encoder": vision, "image_normalizer": normalizer}[component]()


PREFIXES = {"image_encoder": VISUAL, "image_normalizer": EMBEDDINGS}
