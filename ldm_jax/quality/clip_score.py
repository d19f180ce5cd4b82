"""The CLIP score: how well pictures fit their captions, as a CLIP model sees it.

    score = mean of 100 max(cos(E_image(x), E_text(caption)), 0)

(Hessel et al. 2021, eq. 1, with the factor 100 of torchmetrics instead of 2.5.) The model is a folder as transformers
keeps one ("openai/clip-vit-base-patch16"): config.json, model.safetensors or pytorch_model.bin, and the tokenizer's
files. Captions that are too long are cut. Numbers of different models do not compare.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Float
from tqdm import tqdm

from ldm_jax.data import transforms
from ldm_jax.models import clip
from ldm_jax.quality import pictures
from ldm_jax.quality.pictures import Pictures
from ldm_jax.types import Params
from ldm_jax.weights import clip as published
from ldm_jax.weights import features, prompts, table

FILES = ("model.safetensors", "pytorch_model.bin")
TEXT = ("vocab_size", "max_position_embeddings", "eos_token_id")
VISION = ("image_size", "patch_size", "num_channels")

Judge = Callable[[Pictures, Sequence[str]], float]


def load(folder: str | Path | None, batch: int = 32) -> Judge:
    """The score by the model in a folder.

    Raises:
      FileNotFoundError, ValueError: no folder was named, files are missing, or are of another model.
    """
    folder, config, tensors = _opened(folder)
    text = published.text_from_config(_part(config, "text_config", "CLIPTextModel", TEXT))
    ids = jnp.zeros((1, text.length), jnp.int32)
    vision, of_vision = _vision(config, tensors)
    params = [_tower(text, ids, published.text_table, tensors, "text_"), of_vision]
    tokenizer = prompts.load(folder, text.length)

    @jax.jit
    def cosines(params, x, ids):
        of_text = text.apply({"params": params[0]}, ids).pooled
        of_image = vision.apply({"params": params[1]}, clip.prepared(x, vision.size)).pooled
        return _cosine(of_text, of_image)

    def judge(of: Pictures, captions: Sequence[str]) -> float:
        found = []
        with tqdm(total=of.count, unit="picture", desc="CLIP score", mininterval=1.0) as bar:
            for start in range(0, of.count, batch):
                end = min(start + batch, of.count)
                x = jnp.asarray(transforms.to_unit(pictures.stacked(of, start, end)))
                rows = prompts.rows(tokenizer, list(captions[start:end]))
                found.append(np.asarray(cosines(params, x, rows)))
                bar.update(end - start)
        return float(100 * np.concatenate(found).clip(0).mean())

    return judge


def embedder(
    folder: str | Path | None, batch: int = 32
) -> Callable[[Pictures], Float[np.ndarray, "n d"]]:
    """What makes the embeddings of pictures by the model in a folder.

    Raises:
      FileNotFoundError, ValueError: as in `load`.
    """
    _, config, tensors = _opened(folder)
    vision, params = _vision(config, tensors)

    @jax.jit
    def embedded(params, x):
        return vision.apply({"params": params}, clip.prepared(x, vision.size)).pooled

    def embed(of: Pictures) -> Float[np.ndarray, "n d"]:
        found = []
        with tqdm(total=of.count, unit="picture", desc="embedding", mininterval=1.0) as bar:
            for start in range(0, of.count, batch):
                end = min(start + batch, of.count)
                x = jnp.asarray(transforms.to_unit(pictures.stacked(of, start, end)))
                found.append(np.asarray(embedded(params, x), np.float32))
                bar.update(end - start)
        return np.concatenate(found)

    return embed


def _opened(folder: str | Path | None) -> tuple[Path, dict[str, Any], Mapping[str, Any]]:
    """The folder of a CLIP model, its config and its tensors."""
    if folder is None:
        raise ValueError(
            "clip needs a CLIP model: download the folder of one, such as openai/clip-vit-base-patch16, and name it "
            "with --clip FOLDER"
        )
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


def _vision(config: Mapping[str, Any], tensors: Mapping[str, Any]) -> tuple[nn.Module, Params]:
    of = published.vision_from_config(_part(config, "vision_config", "CLIPVisionModel", VISION))
    image = jnp.zeros((1, of.size, of.size, 3))
    return of, _tower(of, image, published.vision_table, tensors, "vis")


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


def _cosine(a: Float[jax.Array, "b d"], b: Float[jax.Array, "b d"]) -> Float[jax.Array, " b"]:
    return (a * b).sum(-1) / (jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1))
