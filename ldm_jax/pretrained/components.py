"""The networks that a pretrained model consists of, each with its config, its module and its names in files."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from ldm_jax.types import Params
from ldm_jax.weights import autoencoder, clip, controlnet, table, unet
from ldm_jax.weights.table import Table

KEY = jax.random.key(0)


@dataclass(frozen=True)
class Component:
    """A network, and how diffusers or transformers keep it."""

    library: str
    kind: str  # its class there
    stem: str  # of its file
    config: Mapping[str, Any]
    module: nn.Module
    rows: Callable[[Mapping[str, Any]], Table]  # the tensors of a file ({}: to write) -> the table
    shapes: Params  # of its parameters, in float32
    ignore: tuple[str, ...] = ()

    def export(self, params: Params) -> dict[str, Any]:
        return table.export(self.rows({}), params)


def _shapes(module: nn.Module, *args: Any) -> Params:
    return jax.eval_shape(module.init, KEY, *args)["params"]


def of_unet(kind: str, config: Mapping[str, Any], dtype: Any) -> Component:
    config = {"_class_name": kind} | dict(config)
    module = unet.from_config(config, dtype)
    shapes = _shapes(module, *unet.example(config))
    rows = unet.table_of(config)
    return Component(
        "diffusers", kind, "diffusion_pytorch_model", config, module, lambda _: rows, shapes
    )


def of_autoencoder(kind: str, config: Mapping[str, Any], dtype: Any) -> Component:
    module = autoencoder.from_config(config, dtype)
    factor = module.factor
    x = jax.ShapeDtypeStruct((1, factor, factor, module.channels), jnp.float32)
    return Component(
        "diffusers",
        kind,
        "diffusion_pytorch_model",
        config,
        module,
        autoencoder.table,
        _shapes(module, x, KEY),
    )


def of_text_encoder(kind: str, config: Mapping[str, Any], dtype: Any) -> Component:
    module = clip.text_from_config({"architectures": [kind]} | dict(config), dtype)
    ids = jax.ShapeDtypeStruct((1, module.length), jnp.int32)
    return Component(
        "transformers",
        kind,
        "model",
        config,
        module,
        clip.text_table,
        _shapes(module, ids),
        clip.IGNORED,
    )


def of_controlnet(kind: str, config: Mapping[str, Any], dtype: Any) -> Component:
    module = controlnet.from_config(config, dtype)
    rows = controlnet.table_of(config)
    return Component(
        "diffusers",
        kind,
        "diffusion_pytorch_model",
        config,
        module,
        lambda _: rows,
        _shapes(module, *controlnet.example(config)),
    )


MAKERS = {
    "UNet2DConditionModel": of_unet,
    "UNet2DModel": of_unet,
    "AutoencoderKL": of_autoencoder,
    "CLIPTextModel": of_text_encoder,
    "CLIPTextModelWithProjection": of_text_encoder,
    "ControlNetModel": of_controlnet,
}


def make(kind: str, config: Mapping[str, Any], dtype: Any) -> Component:
    """The component of a class of diffusers or transformers.

    Raises:
      ValueError: a class, or a setting of it, that we do not know.
    """
    if kind not in MAKERS:
        raise ValueError(
            f"a component of the class {kind} is not known here; known are {sorted(MAKERS)}"
        )
    return MAKERS[kind](kind, config, dtype)
