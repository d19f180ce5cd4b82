"""The networks that a pretrained model consists of, each with its config, its module and its names in files."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from ldm_jax.types import Params
from ldm_jax.weights import (
    autoencoder,
    bert,
    clip,
    controlnet,
    table,
    tiny_autoencoder,
    unclip,
    unet,
    vq,
)
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
    scale: float = 1.0  # of an autoencoder: what latents are multiplied by

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
    family = vq if kind == "VQModel" else autoencoder
    module = family.from_config(config, dtype)
    factor = module.factor
    x = jax.ShapeDtypeStruct((1, factor, factor, module.channels), jnp.float32)
    return Component(
        "diffusers",
        kind,
        "diffusion_pytorch_model",
        config,
        module,
        family.table,
        _shapes(module, x, KEY),
        scale=family.scaling_factor(config),
    )


def of_tiny_autoencoder(kind: str, config: Mapping[str, Any], dtype: Any) -> Component:
    module = tiny_autoencoder.from_config(config, dtype)
    x = jax.ShapeDtypeStruct((1, module.factor, module.factor, module.channels), jnp.float32)
    rows = tiny_autoencoder.table(module.encoder_blocks, module.decoder_blocks)
    return Component(
        "diffusers",
        kind,
        "diffusion_pytorch_model",
        config,
        module,
        lambda _: rows,
        _shapes(module, x),
        scale=tiny_autoencoder.scaling_factor(config),
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


def of_bert(kind: str, config: Mapping[str, Any], dtype: Any) -> Component:
    module = bert.from_config(config, dtype)
    ids = jax.ShapeDtypeStruct((1, module.length), jnp.int32)
    return Component(
        "latent_diffusion",  # of diffusers
        kind,
        "model",
        config,
        module,
        lambda _: bert.table(),
        _shapes(module, ids),
        bert.IGNORED,
    )


def of_image_encoder(kind: str, config: Mapping[str, Any], dtype: Any) -> Component:
    module = clip.vision_from_config({"architectures": [kind]} | dict(config), dtype)
    x = jax.ShapeDtypeStruct((1, module.size, module.size, 3), jnp.float32)
    return Component(
        "transformers",
        kind,
        "model",
        config,
        module,
        clip.vision_table,
        _shapes(module, x),
        clip.IGNORED,
    )


def of_normalizer(kind: str, config: Mapping[str, Any], dtype: Any) -> Component:
    module = unclip.from_config(config)
    return Component(
        "stable_diffusion",  # of diffusers
        kind,
        "diffusion_pytorch_model",
        config,
        module,
        lambda _: unclip.table(),
        _shapes(module, jax.ShapeDtypeStruct((1, module.width), jnp.float32)),
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


AUTOENCODERS = {
    "AutoencoderKL": of_autoencoder,
    "VQModel": of_autoencoder,
    "AutoencoderTiny": of_tiny_autoencoder,
}
MAKERS = AUTOENCODERS | {
    "UNet2DConditionModel": of_unet,
    "UNet2DModel": of_unet,
    "CLIPTextModel": of_text_encoder,
    "CLIPTextModelWithProjection": of_text_encoder,
    "CLIPVisionModelWithProjection": of_image_encoder,
    "LDMBertModel": of_bert,
    "StableUnCLIPImageNormalizer": of_normalizer,
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
