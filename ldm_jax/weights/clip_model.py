"""Both encoders of a CLIP model, from a folder as transformers keeps one ("openai/clip-vit-base-patch16").

config.json, model.safetensors or pytorch_model.bin, and the tokenizer's files.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from ldm_jax.models import clip
from ldm_jax.types import Params
from ldm_jax.weights import clip as published
from ldm_jax.weights import features, prompts, table

FILES = ("model.safetensors", "pytorch_model.bin")
TEXT = ("vocab_size", "max_position_embeddings", "eos_token_id")
VISION = ("image_size", "patch_size", "num_channels")


class Encoder(NamedTuple):
    """One of the two, and its parameters."""

    network: Any  # clip.TextEncoder or clip.VisionEncoder, with a projection
    params: Params


class Model(NamedTuple):
    """CLIP: what makes embeddings of images and of texts in one space."""

    vision: Encoder
    text: Encoder
    tokenizer: prompts.Tokenizer


def load(folder: str | Path) -> Model:
    """The model in a folder.

    Raises:
      FileNotFoundError, ValueError: files are missing, or are of another model.
    """
    folder, config, tensors = _opened(folder)
    text = published.text_from_config(_part(config, "text_config", "CLIPTextModel", TEXT))
    ids = jnp.zeros((1, text.length), jnp.int32)
    params = _tower(text, ids, published.text_table, tensors, "text_")
    tokenizer = prompts.load(folder, text.length)
    return Model(_vision(config, tensors), Encoder(text, params), tokenizer)


def load_vision(folder: str | Path) -> Encoder:
    """The encoder of images alone.

    Raises:
      FileNotFoundError, ValueError: as in `load`.
    """
    _, config, tensors = _opened(folder)
    return _vision(config, tensors)


def of_images(
    network: clip.VisionEncoder, params: Params, x: Float[Array, "b h w 3"]
) -> Float[Array, "b d"]:
    """The embeddings of images in [-1, 1] of any size, whose middle square is seen."""
    return network.apply({"params": params}, clip.prepared(x, network.size)).pooled


def of_texts(network: Any, params: Params, ids: Int[Array, "b n"]) -> Float[Array, "b d"]:
    """The embeddings of texts, given as the rows of the tokenizer."""
    return network.apply({"params": params}, ids).pooled


def cosine(a: Float[Array, "b d"], b: Float[Array, "b d"]) -> Float[Array, " b"]:
    return (a * b).sum(-1) / (jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1))


def _opened(folder: str | Path) -> tuple[Path, dict[str, Any], Mapping[str, Any]]:
    """The folder of a CLIP model, its config and its tensors."""
    folder = Path(folder)
    path = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if path is None or not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} holds no CLIP model: it needs config.json and {' or '.join(FILES)}"
        )
    config = json.loads((folder / "config.json").read_text())
    if config.get("architectures") != ["CLIPModel"]:
        raise ValueError(
            f"{folder} holds {config.get('architectures')}; give the folder of a CLIPModel"
        )
    return folder, config, features.read([path])


def _vision(config: Mapping[str, Any], tensors: Mapping[str, Any]) -> Encoder:
    of = published.vision_from_config(_part(config, "vision_config", "CLIPVisionModel", VISION))
    image = jnp.zeros((1, of.size, of.size, 3))
    return Encoder(of, _tower(of, image, published.vision_table, tensors, "vis"))


def _part(config: Mapping[str, Any], name: str, kind: str, own: Sequence[str]) -> dict[str, Any]:
    """The config of one tower; that of the whole model has entries for text generation beside."""
    known = (published.SHARED.keys() - {"architectures"}) | set(own)
    found = {key: value for key, value in config.get(name, {}).items() if key in known}
    found["projection_dim"] = config.get("projection_dim", published.SHARED["projection_dim"])
    return found | {"architectures": [f"{kind}WithProjection"]}


def _tower(
    network: nn.Module,
    example: jax.Array,
    rows: Callable[..., table.Table],
    tensors: Mapping[str, Any],
    prefix: str,
) -> Params:
    own = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    shapes = jax.eval_shape(network.init, jax.random.key(0), example)["params"]
    return table.load(rows(own), shapes, own, published.IGNORED)
