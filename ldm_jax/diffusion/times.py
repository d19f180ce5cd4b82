"""Which times a diffusion loss sees: functions (rng, b) -> t [b], made from a path.

t = 0, where there is nothing to denoise, is never drawn from a path that is clean there.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from ldm_jax.diffusion.process import Path

Times = Callable[[Key[Array, ""], int], Float[Array, " b"]]
_SMALLEST = 1e-5  # a time that rounds to 0 would make weights of the form 0 / 0


def uniform(path: Path) -> Times:
    """Uniform in t."""
    return lambda rng, b: _scaled(path, jax.random.uniform(rng, (b,)))


def stratified(path: Path) -> Times:
    """Uniform, but evenly spread over the batch (Kingma et al. 2021, appendix I): less variance."""
    return lambda rng, b: _scaled(path, (jax.random.uniform(rng) + jnp.arange(b) / b) % 1.0)


def discrete(path: Path) -> Times:
    """Uniform over the entries of a ddpm path's table (Ho et al. 2020, Algorithm 1; CompVis).

    Raises:
      ValueError: a path that has no table.
    """
    if path.steps is None:
        raise ValueError(
            "the times 'discrete' are entries of a table and this path has none; use 'uniform'"
        )
    # A table, since a compiler may turn a division into a product that is not exact.
    entries = np.arange(path.steps, dtype=np.float32) / np.float32(path.steps - 1)
    return lambda rng, b: jnp.asarray(entries)[jax.random.randint(rng, (b,), 0, path.steps)]


def logit_normal(path: Path, mean: float = 0.0, std: float = 1.0) -> Times:
    """logit(t) ~ N(mean, std^2) (Esser et al. 2024, eq. 19): mostly the middle of the path."""
    return lambda rng, b: _clipped(path, jax.nn.sigmoid(mean + std * jax.random.normal(rng, (b,))))


def log_normal(path: Path, p_mean: float = -1.2, p_std: float = 1.2) -> Times:
    """log(sigma / alpha) ~ N(p_mean, p_std^2) (Karras et al. 2022, Table 1), clipped to the path."""
    return lambda rng, b: path.time_of(-(p_mean + p_std * jax.random.normal(rng, (b,))))


def _scaled(path, u):
    """u in [0, 1) to a time; 1 - u is never 0."""
    return _clipped(path, path.t_max * (1 - u))


def _clipped(path, t):
    return jnp.clip(t, _SMALLEST, path.t_max)
