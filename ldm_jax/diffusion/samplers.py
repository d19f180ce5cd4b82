"""From noise to data: the one loop that walks down a grid of noise levels, which `grids` makes.

A solver is one step between two noise levels p and q, given a denoiser. It knows neither path nor
network, so one solver serves them all; a grid is a `Point` of arrays from the noisy end to clean
data (sigma = 0). Everything but the number of steps is a value: other grids, seeds, guidance
scales, eta run the same compiled program.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key

from ldm_jax.diffusion.grids import grid
from ldm_jax.diffusion.process import Data, Point, over
from ldm_jax.types import Cond, Denoiser, Prediction

__all__ = ["Solver", "Source", "begun", "grid", "initial_noise", "noise", "sample", "stepping"]
Keep = Literal["x0", "x"]
Step = tuple[Data, Any, Data]  # x at q, the memory for the next step, the x0 estimated at p
Carry = tuple[Data, Any]  # x, and the solver's memory of the steps before


class Solver(NamedTuple):
    """One step down the grid. Made by `solvers`."""

    init: Callable[[Data], Any]  # x -> memory
    # (denoise(x, t), x, p, q, memory, rng) -> (x at q, memory, x0 estimated at p)
    step: Callable[[Callable[[Array, Array], Prediction], Data, Point, Point, Any, Array], Step]


Source = (
    Key[Array, "..."] | Float[Array, "..."]
)  # of noise: a key, one a sample, or the noise itself


def noise(rng: Source, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """Standard normal noise; with one key a sample, [b], no sample depends on the others.

    Noise that is given in place of a key is returned, so that another implementation's can be used.

    Raises:
      ValueError: given noise of another shape.
    """
    if jnp.issubdtype(rng.dtype, jnp.floating):
        if rng.shape != shape:
            raise ValueError(f"noise of shape {rng.shape} was given where {shape} is needed")
        return rng.astype(dtype)
    if rng.ndim:
        return jax.vmap(lambda key: jax.random.normal(key, shape[1:], dtype))(rng)
    return jax.random.normal(rng, shape, dtype)


def initial_noise(points: Point, rng: Key[Array, "..."], shape: tuple[int, ...]) -> Data:
    """x at the noisy end: normal, as wide as data of unit variance are there.

    That is 1 on variance-preserving paths and flows, and sqrt(1 + sigma_max^2) on the path edm.
    """
    scale = jnp.sqrt(points.alpha[0] ** 2 + points.sigma[0] ** 2)
    x = noise(rng, shape, scale.dtype)
    return over(scale, x) * x


def sample(
    denoise: Denoiser,
    solver: Solver,
    points: Point,
    x_T: Data,
    rng: Source,
    cond: Cond,
    keep: Keep | tuple[Keep, ...] | None = None,
) -> tuple[Data, Any]:
    """Walks `x_T` down the grid; returns x at its end and what was to be kept of each step, [steps b *space c].

    That is keep="x0", the estimate of x0, "x", where the step began, or a tuple of these.

    The values of the grid are scalars, [steps + 1], or one a sample, [steps + 1, b]. `rng` is a
    key, one key a sample, [b], or the noise of every step, [steps b *space c]; [steps 2 b *space c] where the solver
    draws twice a step.

    Raises:
      ValueError: noise for another number of steps.
    """
    step = stepping(denoise, solver, points, rng, cond, keep)
    (x, _), kept = lax.scan(step, begun(solver, points, x_T), jnp.arange(len(points.t) - 1))
    return x, kept


def begun(solver: Solver, points: Point, x_T: Data) -> Carry:
    """What `stepping` begins with."""
    x_T = x_T.astype(points.alpha.dtype)
    return x_T, solver.init(x_T)


def stepping(
    denoise: Denoiser,
    solver: Solver,
    points: Point,
    rng: Source,
    cond: Cond,
    keep: Keep | tuple[Keep, ...] | None = None,
) -> Callable[[Carry, Any], tuple[Carry, Any]]:
    """`(carry, i) -> (carry, what is kept)`, the i-th step of `sample`, for those who walk by themselves.

    Raises:
      ValueError: as `sample`.
    """
    steps = len(points.t) - 1
    given = jnp.issubdtype(rng.dtype, jnp.floating)
    if given and len(rng) != steps:
        raise ValueError(f"noise for {len(rng)} steps was given, the grid has {steps}")
    fold = jax.vmap(jax.random.fold_in, (0, None)) if rng.ndim else jax.random.fold_in

    def at(a, i):
        return lax.dynamic_index_in_dim(jnp.asarray(a), i, keepdims=False)

    def asked(x, t):
        return denoise(x, jnp.broadcast_to(t, x.shape[:1]), cond)

    def step(carry, i):
        p, q = (Point(*(at(a, j) for a in points)) for j in (i, i + 1))
        source = at(rng, i) if given else fold(rng, i)
        x, memory, x0 = solver.step(asked, carry[0], p, q, carry[1], source)
        return (x, memory), jax.tree.map({"x0": x0, "x": carry[0]}.get, keep)

    return step
