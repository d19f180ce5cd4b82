"""The U-Nets under diffusers' names: `UNet2DConditionModel` and `UNet2DModel`.

The former are those of Stable Diffusion 1, 2 and XL and of what was made from them: inpainting, edits by instruction,
depth, upscaling, image variation; and that of latent diffusion's text-to-image model. They have spatial transformers.
The latter, of the unconditional latent diffusion models, have plain attention.

A config has in_channels for what we give in two parts, the latents and `cond.spatial`; and it has widths of the
condition, where our parameters follow from an example. `example` makes one.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from ldm_jax import tree
from ldm_jax.models import unet
from ldm_jax.types import Cond
from ldm_jax.weights import blocks, configs, unet_plain
from ldm_jax.weights import unet_sections as sections
from ldm_jax.weights.table import Row, Table

Embedding = Literal["class_embedding", "add_embedding"]  # where they keep what reads `cond.vector`
SDXL_TIMES = 256  # width of the sinusoids of each size in SDXL's vector


def table(transformer: bool = True, embedding: Embedding = "class_embedding") -> Table:
    """`models.unet.UNet`; with spatial transformers, or with plain attention (`UNet2DModel`)."""
    return (
        *entrance(embedding),
        *blocks.levels(blocks.TRANSFORMER if transformer else blocks.ATTENTION),
    )


def entrance(embedding: Embedding = "class_embedding") -> tuple[Row, ...]:
    """How time and vector come in; "add_embedding" is SDXL's."""
    return (
        Row("time/in", "time_embedding.linear_1"),
        Row("time/out", "time_embedding.linear_2"),
        Row("vector/in", f"{embedding}.linear_1"),
        Row("vector/out", f"{embedding}.linear_2"),
        Row("vector", "class_embedding"),  # a table
    )


CONDITIONAL = dict(
    num_attention_heads=None,
    only_cross_attention=False,
    cross_attention_dim=1280,
    transformer_layers_per_block=1,
    use_linear_projection=False,
    addition_embed_type=None,
    projection_class_embeddings_input_dim=None,
)
ONLY_CONDITIONAL = sections.ONLY | dict(
    mid_block_type=("UNetMidBlock2DCrossAttn",),
    conv_in_kernel=(3,),
    conv_out_kernel=(3,),
    resnet_out_scale_factor=(1,),
    attention_type=("default",),
    class_embed_type=(None, "projection"),
    addition_embed_type=(None, "text_time"),
    addition_time_embed_dim=(None, SDXL_TIMES),
)


def from_config(config: Mapping[str, Any], dtype: Any = jnp.float32) -> unet.UNet:
    """The network of a `config.json`, by its `_class_name` (UNet2DConditionModel where there is none).

    Raises:
      ValueError: a model that `models.unet.UNet` cannot be.
    """
    plain = is_plain(config)
    if plain:
        settings = unet_plain.settings(config)
    else:
        settings, _ = conditional_settings(config, "U-Net", {}, idle=("up_block_types",))
    down, up = config.get("down_block_types"), config.get("up_block_types")
    mirror = [name.replace("Down", "Up") for name in reversed(down or ())]
    if (down is None) != (up is None) or (down and list(up) != mirror):
        raise ValueError(
            f"the way up, up_block_types={up}, is not the mirror image of the way down, down_block_types={down}; "
            "such a U-Net cannot be loaded"
        )
    return unet.UNet(**settings, out_channels=channels(config).out, dtype=dtype)


def is_plain(config: Mapping[str, Any]) -> bool:
    """Whether the model is a `UNet2DModel`, without tokens.

    Raises:
      ValueError: the config is that of another class.
    """
    name = config.get("_class_name", "UNet2DConditionModel")
    if name not in ("UNet2DConditionModel", "UNet2DModel"):
        raise ValueError(
            f"the config is that of a {name}; expected UNet2DConditionModel or UNet2DModel"
        )
    return name == "UNet2DModel"


def conditional_settings(
    config: Mapping[str, Any],
    what: str,
    own: Mapping[str, Any],
    only: Mapping[str, Any] = {},
    idle: Sequence[str] = (),
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of a `UNet2DConditionModel`, or of the half of it that a ControlNet is; and the values of `own`."""
    c = configs.read(
        config,
        what,
        sections.COMMON | CONDITIONAL | own,
        ONLY_CONDITIONAL | only,
        (*sections.IDLE, *idle),
    )
    levels = len(c["block_out_channels"])
    attends = sections.attends(c["down_block_types"], "CrossAttnDownBlock2D")
    depths = c["transformer_layers_per_block"]
    depths = (depths,) * levels if isinstance(depths, int) else depths
    if not all(isinstance(d, int) and d > 0 for d in depths):
        raise ValueError(
            f"transformer_layers_per_block={depths} must be one positive number a level; such a {what} cannot be loaded"
        )
    only_cross = c["only_cross_attention"]
    only_cross = (only_cross,) * levels if isinstance(only_cross, bool) else only_cross
    only_cross = tuple(o and a for o, a in zip(only_cross, attends, strict=True))
    sections.equal(c, "cross_attention_dim")
    settings = sections.common(c, what) | dict(
        attention=tuple(d if a else 0 for d, a in zip(depths, attends, strict=True)),
        middle=depths[-1],
        heads=c["num_attention_heads"] or c["attention_head_dim"],
        projection="linear" if c["use_linear_projection"] else "conv",
        only_cross=only_cross if any(only_cross) else (),
        **sections.vector(c),
    )
    return settings, {key: c[key] for key in own}


def embedding_of(config: Mapping[str, Any]) -> Embedding:
    """Where the model of this config keeps what reads `cond.vector`: for `table` and `to_config`."""
    return "class_embedding" if config.get("addition_embed_type") is None else "add_embedding"


def table_of(config: Mapping[str, Any]) -> Table:
    """The table of the model of this config."""
    return table(not is_plain(config), embedding_of(config))


class Channels(NamedTuple):
    """Of what the network reads and writes."""

    latent: int  # of x
    spatial: int  # of `cond.spatial`; 0: none
    out: int  # more than those of x where the network also predicts a variance


def channels(config: Mapping[str, Any]) -> Channels:
    """What is beyond the channels of the output is the spatial condition: a mask, a depth, another image."""
    default = 3 if is_plain(config) else 4
    read, out = config.get("in_channels", default), config.get("out_channels", default)
    latent = min(read, out)
    return Channels(latent, read - latent, out)


def example(config: Mapping[str, Any], batch: int = 1) -> tuple[Any, Any, Cond]:
    """The shapes of (x, t, cond) that the model of this config reads, of the least size: for `jax.eval_shape`."""
    return example_of(
        from_config(config), channels(config), config.get("cross_attention_dim", 1280), batch
    )


def example_of(
    network: unet.UNet, sizes: Channels, tokens: int | Sequence[int], batch: int = 1
) -> tuple[Any, Any, Cond]:
    """`example` for a network of ours, a number of channels and a width of tokens."""
    side = 2 ** (len(network.mults) - 1)
    reads = network.transformer and any((*network.attention, network.middle))
    width = tokens if isinstance(tokens, int) else tokens[0]

    def shape(*sizes):
        return jax.ShapeDtypeStruct((batch, *sizes), jnp.float32)

    cond = Cond(
        vector=shape(network.vector) if network.vector else None,
        tokens=shape(1, width) if reads else None,
        spatial=shape(side, side, sizes.spatial) if sizes.spatial else None,
    )
    return shape(side, side, sizes.latent), shape(), cond


def to_config(
    network: unet.UNet, params: Any, embedding: Embedding = "class_embedding"
) -> dict[str, Any]:
    """The `config.json` from which diffusers builds the same model; `params` may be shapes.

    Raises:
      ValueError: a network that diffusers has not.
    """
    depths = network.attention or (0,) * len(network.mults)
    plain = not network.transformer or not any((*depths, network.middle))
    common = sections.to_common(network, params)
    common["out_channels"] = params["conv_out"]["kernel"].shape[-1]
    if plain:
        return common | unet_plain.to_config(network, depths)
    config = common | conditional_config(network, params, embedding)
    config["_class_name"] = "UNet2DConditionModel"
    config["up_block_types"] = [
        name.replace("Down", "Up") for name in reversed(config["down_block_types"])
    ]
    return config


def conditional_config(network: unet.UNet, params: Any, embedding: Embedding) -> dict[str, Any]:
    """What a `UNet2DConditionModel` and a ControlNet have beside `unet_sections.to_common`."""
    levels = len(network.mults)
    depths = tuple(network.attention) or (0,) * levels
    if not network.middle or depths[-1] not in (0, network.middle) or network.resample_blocks:
        raise ValueError(
            f"diffusers has no such U-Net: middle={network.middle} must be positive and the depth of the last level, "
            f"attention={depths}, if it attends; resample_blocks={network.resample_blocks} must be False"
        )
    wide = [network.width * m for m in network.mults]
    if network.head_dim is not None:
        heads = [math.ceil(w / network.head_dim) for w in wide]
    else:
        heads = network.heads if isinstance(network.heads, int) else list(network.heads)
    named = zip(tree.names(params), jax.tree.leaves(params), strict=True)
    tokens = next(leaf.shape[0] for name, leaf in named if name.endswith("cross_attn/k/kernel"))
    config = dict(
        down_block_types=["CrossAttnDownBlock2D" if d else "DownBlock2D" for d in depths],
        mid_block_type="UNetMidBlock2DCrossAttn",
        attention_head_dim=heads,  # which they read as the number of heads
        cross_attention_dim=tokens,
        transformer_layers_per_block=[d or 1 for d in depths[:-1]] + [network.middle],
        use_linear_projection=network.projection == "linear",
        only_cross_attention=list(network.only_cross) or False,
    )
    if not network.vector:
        return config
    if network.vector_from == "table":
        return config | dict(num_class_embeds=network.vector)
    config["projection_class_embeddings_input_dim"] = network.vector
    if embedding == "class_embedding":
        return config | dict(class_embed_type="projection")
    return config | dict(addition_embed_type="text_time", addition_time_embed_dim=SDXL_TIMES)
