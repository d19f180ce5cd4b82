"""Vectors of pictures, by which neighbours are found: of a CLIP model, or the pool features of `shapes`.

A network is known by its name and the hash of its weights, so that an index is not searched with another's vectors.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from ldm_jax.data import transforms
from ldm_jax.quality import clip_score, extractors, pictures
from ldm_jax.quality.pictures import Pictures
from ldm_jax.training import sharding
from ldm_jax.weights import clip_model

BATCH = 256  # pictures at once
OF_CLIP = 32  # of a CLIP model


class Embedding(NamedTuple):
    """What makes vectors of pictures."""

    network: str
    size: int | None  # the side of pictures that it takes; None: any
    embed: Callable[[Pictures], Float[np.ndarray, "n d"]]


def named(clip: str | Path | None, features: str | None) -> Embedding:
    """By the CLIP model in a folder, or by the feature network "shapes:FILE".

    Raises:
      FileNotFoundError, ValueError: both or neither were named, files are missing, or are of another network.
    """
    if (clip is None) == (features is None):
        raise ValueError(
            "name one network that embeds pictures: --clip FOLDER of a CLIP model, or --features shapes:FILE"
        )
    return of_clip(clip) if features is None else of_shapes(features)


def of_shapes(features: str) -> Embedding:
    """By the pool features of the network "shapes:FILE"; raises as `named`."""
    kind, _, path = features.partition(":")
    if kind != "shapes" or not path:
        raise ValueError(f"there are no features {features!r} to embed by; give 'shapes:FILE'")
    mesh = sharding.make_mesh()
    network = extractors.of_shapes(path, mesh)

    def embed(of: Pictures) -> Float[np.ndarray, "n d"]:
        found = extractors.run(network, of, mesh, BATCH)
        return np.concatenate([activations.pool for activations in found])

    return Embedding(f"{network.name} {network.digest}", network.size[0], embed)


def of_clip(folder: str | Path) -> Embedding:
    """By a CLIP model's encoder of images; raises as `clip_score.load`."""
    vision, params = clip_model.load_vision(clip_score.named(folder))
    embedded = jax.jit(lambda params, x: clip_model.of_images(vision, params, x))

    def embed(of: Pictures) -> Float[np.ndarray, "n d"]:
        found = []
        with pictures.bar_of(of.count, "embedding") as bar:
            for start in range(0, of.count, OF_CLIP):
                end = min(start + OF_CLIP, of.count)
                x = jnp.asarray(transforms.to_unit(pictures.stacked(of, start, end)))
                found.append(np.asarray(embedded(params, x), np.float32))
                bar.update(end - start)
        return np.concatenate(found)

    return Embedding(f"CLIP {extractors.digest(params)}", vision.size, embed)
