"""The networks that a pretrained model consists of, each with its config, its module and its names in files."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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


class Tensors(NamedTuple):
    """Those of a component in its files, and how their names are read."""

    tensors: Mapping[str, Any]
    rows: Table
    ignore: Sequence[str]


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

    def stored(self, tensors: Mapping[str, Any]) -> Tensors:
        """The tensors of its own files."""
        return Tensors(tensors, self.rows(tensors), self.ignore)

    def check(self, given: Tensors) -> None:
        """Raises as `table.check`: they are not this network's."""
        table.check(given.rows, self.shapes, given.tensors, given.ignore)

    def load(self, given: Tensors, dtype: Any, layouts: Params) -> Params:
        """The parameters, born with these shardings; raises as `table.load`."""
        shapes = jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=where),
            self.shapes,
            layouts,
        )
        return table.load(given.rows, shapes, given.tensors, ignore=given.ignore)

    def export(self, params: Params) -> dict[str, Any]:
        return table.export(self.rows({}), params)


class Parts(NamedTuple):
    """What a class of theirs is here."""

    module: nn.Module
    rows: Callable[[Mapping[str, Any]], Table]
    inputs: tuple[Any, ...]  # shapes of what the module reads
    ignore: tuple[str, ...] = ()
    scale: float = 1.0


def _shape(*sizes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, *sizes), dtype)


def _key() -> jax.ShapeDtypeStruct:
    return jax.eval_shape(jax.random.key, 0)


def _pixels(module: Any) -> jax.ShapeDtypeStruct:
    return _shape(module.factor, module.factor, module.channels)


def of_unet(config: Mapping[str, Any], dtype: Any) -> Parts:
    rows = unet.table_of(config)
    return Parts(unet.from_config(config, dtype), lambda _: rows, unet.example(config))


def of_autoencoder(config: Mapping[str, Any], dtype: Any) -> Parts:
    module = autoencoder.from_config(config, dtype)
    scale = autoencoder.scaling_factor(config)
    return Parts(module, autoencoder.table, (_pixels(module), _key()), scale=scale)


def of_vq(config: Mapping[str, Any], dtype: Any) -> Parts:
    module = vq.from_config(config, dtype)
    return Parts(module, vq.table, (_pixels(module), _key()), scale=vq.scaling_factor(config))


def of_tiny_autoencoder(config: Mapping[str, Any], dtype: Any) -> Parts:
    module = tiny_autoencoder.from_config(config, dtype)
    rows = tiny_autoencoder.table(module.encoder_blocks, module.decoder_blocks)
    scale = tiny_autoencoder.scaling_factor(config)
    return Parts(module, lambda _: rows, (_pixels(module),), scale=scale)


def of_text_encoder(config: Mapping[str, Any], dtype: Any) -> Parts:
    module = clip.text_from_config(config, dtype)
    ids = _shape(module.length, dtype=jnp.int32)
    return Parts(module, clip.text_table, (ids,), clip.IGNORED)


def of_image_encoder(config: Mapping[str, Any], dtype: Any) -> Parts:
    module = clip.vision_from_config(config, dtype)
    return Parts(module, clip.vision_table, (_shape(module.size, module.size, 3),), clip.IGNORED)


def of_bert(config: Mapping[str, Any], dtype: Any) -> Parts:
    module = bert.from_config(config, dtype)
    ids = _shape(module.length, dtype=jnp.int32)
    return Parts(module, lambda _: bert.table(), (ids,), bert.IGNORED)


def of_normalizer(config: Mapping[str, Any], dtype: Any) -> Parts:
    module = unclip.from_config(config)
    return Parts(module, lambda _: unclip.table(), (_shape(module.width),))


def of_controlnet(config: Mapping[str, Any], dtype: Any) -> Parts:
    rows = controlnet.table_of(config)
    module = controlnet.from_config(config, dtype)
    return Parts(module, lambda _: rows, controlnet.example(config))


class Kind(NamedTuple):
    """A class of theirs: where it is from, what its files are named, and how it is made here."""

    library: str
    stem: str
    parts: Callable[[Mapping[str, Any], Any], Parts]


def _diffusers(parts: Callable[..., Parts], library: str = "diffusers") -> Kind:
    return Kind(library, "diffusion_pytorch_model", parts)


AUTOENCODERS = {
    "AutoencoderKL": _diffusers(of_autoencoder),
    "VQModel": _diffusers(of_vq),
    "AutoencoderTiny": _diffusers(of_tiny_autoencoder),
}
KINDS = AUTOENCODERS | {
    "UNet2DConditionModel": _diffusers(of_unet),
    "UNet2DModel": _diffusers(of_unet),
    "ControlNetModel": _diffusers(of_controlnet),
    "CLIPTextModel": Kind("transformers", "model", of_text_encoder),
    "CLIPTextModelWithProjection": Kind("transformers", "model", of_text_encoder),
    "CLIPVisionModelWithProjection": Kind("transformers", "model", of_image_encoder),
    # Modules of diffusers' pipelines.
    "LDMBertModel": Kind("latent_diffusion", "model", of_bert),
    "StableUnCLIPImageNormalizer": _diffusers(of_normalizer, "stable_diffusion"),
}


def make(kind: str, config: Mapping[str, Any], dtype: Any) -> Component:
    """The component of a class of diffusers or transformers.

    Raises:
      ValueError: a class, or a setting of it, that we do not know.
    """
    if kind not in KINDS:
        raise ValueError(
            f"a component of the class {kind} is not known here; known are {sorted(KINDS)}"
        )
    library, stem, parts = KINDS[kind]
    # Configs that were written by hand may leave out what the index says.
    said = {"architectures": [kind]} if library == "transformers" else {"_class_name": kind}
    config = said | dict(config)
    made = parts(config, dtype)
    shapes = jax.eval_shape(made.module.init, _key(), *made.inputs)["params"]
    return Component(
        library, kind, stem, config, made.module, made.rows, shapes, made.ignore, made.scale
    )
