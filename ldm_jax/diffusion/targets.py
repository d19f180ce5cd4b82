"""What a network predicts: the rows (a, b) of F = a x0 + b eps.

| target | a             | b            | F                                                  |
|--------|---------------|--------------|----------------------------------------------------|
| eps    | 0             | 1            | the noise                                          |
| x0     | 1             | 0            | the data                                           |
| v      | -sigma        | alpha        | Salimans & Ho 2022                                 |
| flow   | alpha'        | sigma'       | the velocity dx_t / dt; eps - x0 on straight paths |
| edm    | sigma / (s m) | -s alpha / m | of unit variance, and uncorrelated with x_t        |

with s = sigma_data and m = sqrt(sigma^2 + alpha^2 s^2). The edm row is the preconditioning of
Karras et al. 2022, Table 1, carried over to any alpha: on alpha = 1 it is theirs, on a
variance-preserving path with s = 1 it is -v.
"""

import jax
import jax.numpy as jnp

from ldm_jax.diffusion.process import Path, Target

CONTINUOUS_SCALE = 1000.0  # sinusoidal embeddings are made for times up to about 1000
LOG_SIGMA_LIMIT = (
    10.0  # far outside of what is trained; keeps log(sigma / alpha) finite at both ends
)


def _clock(path, t):
    """(steps - 1) t on a table, so that t = i / (steps - 1) reads as the integer i; else 1000 t."""
    return t * (path.steps - 1.0 if path.steps else CONTINUOUS_SCALE)


def _c_in(path, t):
    return path.c_in(t)


def eps() -> Target:
    """The noise (Ho et al. 2020, eq. 14)."""
    return Target(lambda path, t: (jnp.zeros_like(t), jnp.ones_like(t)), _c_in, _clock)


def x0() -> Target:
    """The clean data."""
    return Target(lambda path, t: (jnp.ones_like(t), jnp.zeros_like(t)), _c_in, _clock)


def v() -> Target:
    """v = alpha eps - sigma x0 (Salimans & Ho 2022, appendix D)."""
    return Target(lambda path, t: (-path.sigma(t), path.alpha(t)), _c_in, _clock)


def flow() -> Target:
    """The velocity dx_t / dt = alpha' x0 + sigma' eps (Lipman et al. 2023, eq. 13)."""

    def row(path: Path, t):
        one = jnp.ones_like(t)
        return jax.jvp(path.alpha, (t,), (one,))[1], jax.jvp(path.sigma, (t,), (one,))[1]

    return Target(row, _c_in, _clock)


def edm(sigma_data: float = 0.5) -> Target:
    """The raw network of Karras et al. 2022, eq. 7 and Table 1, for data of std `sigma_data`.

    The network reads x_t scaled to unit variance, and log(sigma / alpha) / 4 as its time.
    """
    if sigma_data <= 0:
        raise ValueError(
            f"sigma_data = {sigma_data} must be positive; it is the standard deviation of the data"
        )

    def norm(path, t):
        return jnp.sqrt(path.sigma(t) ** 2 + (sigma_data * path.alpha(t)) ** 2)

    def row(path, t):
        n = norm(path, t)
        return path.sigma(t) / (sigma_data * n), -sigma_data * path.alpha(t) / n

    def c_time(path, t):
        level = jnp.log(path.sigma(t)) - jnp.log(path.alpha(t))
        return jnp.clip(level, -LOG_SIGMA_LIMIT, LOG_SIGMA_LIMIT) / 4

    return Target(row, lambda path, t: 1 / norm(path, t), c_time)
