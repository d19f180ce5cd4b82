"""Training from a cache of latents: whether it is of the run's autoencoder, and what the model's codec then is."""

import hashlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ldm_jax import codec, tree
from ldm_jax.data import latents
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.types import Params


def digest(arrays: Params) -> str:
    """sha256 of the parameters of an autoencoder: names and values."""
    found = hashlib.sha256()
    for name, leaf in zip(tree.names(arrays), jax.tree.leaves(arrays), strict=True):
        found.update(name.encode() + np.asarray(leaf).tobytes())
    return found.hexdigest()


def step(source: Any) -> int | None:
    """The step of the autoencoder's run by which a cache was written; None for pictures."""
    return source.plan.codec["step"] if isinstance(source, latents.Cached) else None


def identity(source: Any) -> str:
    """What a compiled step has to know of a cache: nothing for pictures."""
    return source.fingerprint if isinstance(source, latents.Cached) else ""


def model(of: LatentDiffusion, source: Any, sha256: Callable[[], str]) -> LatentDiffusion:
    """The model as it is trained: on a cache its codec encodes what the cache holds; `sha256()` is of its autoencoder.

    Raises:
      ValueError: the cache was written by another autoencoder.
    """
    if not isinstance(source, latents.Cached):
        return of
    by = source.plan.codec
    if by["sha256"] != sha256():
        raise ValueError(
            f"the {source.name} were encoded by the autoencoder of {by['from']}, which is not the one of this config; "
            "write another cache, or give the config that autoencoder"
        )
    return of._replace(codec=codec.from_moments(of.codec, source.plan.posterior))
