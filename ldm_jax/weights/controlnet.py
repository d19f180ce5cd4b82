"""ControlNets under diffusers' names: `ControlNetModel`."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax.models import controlnet
from ldm_jax.models.unet import UNet
from ldm_jax.types import Cond
from ldm_jax.weights import blocks, unet
from ldm_jax.weights import unet_sections as sections
from ldm_jax.weights.table import Row, Table

OWN = dict(
    conditioning_embedding_out_channels=(16, 32, 96, 256),
    global_pool_conditions=False,
)
ONLY = dict(controlnet_conditioning_channel_order=("rgb",))
IDLE = ("conditioning_channels",)


def table(embedding: unet.Embedding = "class_embedding") -> Table:
    """`models.controlnet.ControlNet`; "add_embedding" is SDXL's."""
    return (
        *unet.entrance(embedding),
        Row("hint/conv_in", "controlnet_cond_embedding.conv_in"),
        Row("hint/conv_out", "controlnet_cond_embedding.conv_out"),
        Row("hint/conv_{i}", "controlnet_cond_embedding.blocks.{i}"),
        Row("zero_mid", "controlnet_mid_block"),
        Row("zero_{i}", "controlnet_down_blocks.{i}"),
        *blocks.levels(blocks.TRANSFORMER),
    )


def table_of(config: Mapping[str, Any]) -> Table:
    """The table of the model of this config."""
    return table(unet.embedding_of(config))


def from_config(
    config: Mapping[str, Any], dtype: Any = jnp.float32, spatial: bool = False
) -> controlnet.ControlNet:
    """The network of a `config.json`; `spatial` if its in_channels count the spatial condition.

    Raises:
      ValueError: a model that `models.controlnet.ControlNet` cannot be.
    """
    if (name := config.get("_class_name", "ControlNetModel")) != "ControlNetModel":
        raise ValueError(f"the config is that of a {name}; expected ControlNetModel")
    settings, own = unet.conditional_settings(config, "ControlNet", OWN, ONLY, IDLE)
    return controlnet.ControlNet(
        UNet(**settings, dtype=dtype),
        hint=own["conditioning_embedding_out_channels"],
        spatial=spatial,
        pool=own["global_pool_conditions"],
    )


def example(config: Mapping[str, Any], batch: int = 1) -> tuple[Any, Any, Cond, Any]:
    """The shapes of (x, t, cond, hint) that the model of this config reads, of the least size."""
    network = from_config(config)
    sizes = unet.Channels(config.get("in_channels", 4), 0, 0)
    tokens = config.get("cross_attention_dim", 1280)
    x, t, cond = unet.example_of(network.unet, sizes, tokens, batch)
    side = x.shape[1] * 2 ** (len(network.hint) - 1)
    shape = (batch, side, side, config.get("conditioning_channels", 3))
    return x, t, cond, jax.ShapeDtypeStruct(shape, jnp.float32)


def to_config(
    network: controlnet.ControlNet, params: Any, embedding: unet.Embedding = "class_embedding"
) -> dict[str, Any]:
    """The `config.json` from which diffusers builds the same model; `params` may be shapes.

    Raises:
      ValueError: a network that diffusers has not.
    """
    config = sections.to_common(network.unet, params)
    if config.pop("dropout"):
        raise ValueError("diffusers' ControlNets have no dropout; set dropout=0")
    return (
        config
        | unet.conditional_config(network.unet, params, embedding)
        | dict(
            _class_name="ControlNetModel",
            conditioning_channels=params["hint"]["conv_in"]["kernel"].shape[-2],
            conditioning_embedding_out_channels=list(network.hint),
            global_pool_conditions=network.pool,
        )
    )
