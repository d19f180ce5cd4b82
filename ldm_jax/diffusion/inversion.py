"""From data back to the noise that makes them, so that they can be made again under another condition.

Two ways. The deterministic one walks the probability-flow ODE from data to noise: `invert`. Its steps are not exactly
those of the way down, so that the round trip has an error of the solver's order, or none if each step is solved
(`implicit` with several iterations). The stochastic one (`edit_friendly`, Huberman-Spiegelglas et al. 2024) noises the
data independently at every level and asks what noise takes a stochastic solver from each to the next: that is exact at
once, whatever the model, and what it keeps of the data is larger.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ldm_jax.diffusion import samplers
from ldm_jax.diffusion.process import Data, Point, over
from ldm_jax.diffusion.samplers import Solver, Source, noise
from ldm_jax.types import Cond, Denoiser


def upwards(points: Point) -> Point:
    """The grid from data to noise."""
    return Point(*(a[::-1] for a in points))


def implicit(iterations: int = 1) -> Solver:
    """The inverse of a step of ddim(0) from q to p: x_q such that this step leads to x_p.

        x_q = alpha_q x0 + sigma_q eps,   x0 = (x_p - sigma_p eps) / alpha_p,   eps = eps(x_p, t_q)

    is what DDIM inversion commonly means (Mokady et al. 2023, eq. 3; diffusers' DDIMInverseScheduler, for models that
    predict eps). Each further iteration has the x_q so far in place of x_p in eps(x_p, t_q); where the estimates vary
    less than x they go to the exact inverse (Pan et al. 2023). In a step to pure noise, which is all eps there, x0 is
    what is read of the network. It is asked at the noisier end, so that clean data are no special case. Order 1, one
    call an iteration.

    Raises:
      ValueError: fewer than one iteration.
    """
    if iterations < 1:
        raise ValueError(f"{iterations} iterations cannot invert a step; give at least 1")

    def step(denoise, x, p, q, memory, rng):
        pure, dirty = q.alpha == 0, p.sigma > 0

        def closer(_, found):
            x0, eps = denoise(found[0], q.t)
            of_eps = (x - over(p.sigma, x) * eps) / over(p.alpha, x)
            of_x0 = (x - over(p.alpha, x) * x0) / over(jnp.where(dirty, p.sigma, 1), x)
            x0 = jnp.where(over(pure, x), x0, of_eps)
            eps = jnp.where(over(pure & dirty, x), of_x0, eps)
            return over(q.alpha, x) * x0 + over(q.sigma, x) * eps, x0

        # As wide as data of unit variance are there: on variance-preserving paths x itself.
        width = jnp.hypot(q.alpha, q.sigma) / jnp.hypot(p.alpha, p.sigma)
        found = closer(0, (over(width, x) * x, x))
        x_q, x0 = lax.fori_loop(1, iterations, closer, found) if iterations > 1 else found
        return x_q, memory, x0

    return Solver(lambda x: (), step)


def rising(solver: Solver) -> Solver:
    """A solver of the ODE for the way up, whose step from clean data, where eps cannot be read, is `implicit`'s."""

    def step(denoise, x, p, q, memory, rng):
        after = solver.step, implicit().step
        go, leave = (lambda f=f: f(denoise, x, p, q, memory, rng)[::2] for f in after)
        # Only solvers without a memory can change the direction in which they walk.
        if jax.tree.leaves(memory):
            raise ValueError("a solver that remembers steps cannot begin at clean data; use heun")
        x_q, x0 = lax.cond(jnp.all(p.sigma > 0), go, leave)
        return x_q, memory, x0

    return Solver(solver.init, step)


def invert(
    denoise: Denoiser, points: Point, x0: Data, cond: Cond, solver: Solver | None = None
) -> tuple[Data, Float[Array, "levels b *space c"]]:
    """Data -> noise, and x at all levels of the grid, from noise to data: the first is the noise, the last `x0`.

    `points` is the grid of the way down; `solver` is deterministic: `implicit()` where none is given, or
    `rising(solvers.euler())`, `rising(solvers.heun())`; within `editing.resting` where the grid is `editing.cut`.
    """
    up, key = upwards(points), jax.random.key(0)
    x_T, way = samplers.sample(denoise, solver or implicit(), up, x0, key, cond, keep="x")
    return x_T, jnp.concatenate([x_T[None], way[::-1]])


INVERTIBLE = ("ddpm", "ddim")  # solvers that `edit_friendly` takes, where they add noise


class Inverted(NamedTuple):
    """What takes a stochastic solver to given data: `sample(denoise, solver, points, x_T, noises, cond)[0] + rest`."""

    x_T: Data
    noises: Float[Array, "steps b *space c"]
    rest: Data  # what the last step lacks, which has no noise where the grid ends at clean data


def edit_friendly(
    denoise: Denoiser, solver: Solver, points: Point, x0: Data, rng: Source, cond: Cond
) -> Inverted:
    """The noises that lead a solver through independently noised data (Huberman-Spiegelglas et al. 2024, Algorithm 1).

    `solver` adds noise at the end of its steps: one of `INVERTIBLE`, ddim with eta > 0. Edits are made by another
    condition, and begin later to keep more: walk from x at a later level with the noises from there (`editing.cut`).
    """
    given = jnp.issubdtype(rng.dtype, jnp.floating)
    if given:  # of every level, the noisy end first
        first, rest = rng[0], rng[1:]
    elif rng.ndim:
        first, rest = jax.vmap(jax.random.split, out_axes=1)(rng)
    else:
        first, rest = jax.random.split(rng)

    def step(denoise, x, p, q, memory, source):
        goal = over(q.alpha, x) * x0 + over(q.sigma, x) * noise(source, x.shape, x.dtype)
        # What stands at the end of the grid is taken for data, also where the grid ends a little before.
        goal = jnp.where(over(q.t == points.t[-1], x), x0, goal)

        def with_noise(z):
            after, *others = solver.step(denoise, x, p, q, memory, z)
            return after, others

        # A step is linear in its noise: its value at none, and its slope. The network is asked once.
        zero = jnp.zeros_like(x)
        mean, width, (memory, _) = jax.jvp(with_noise, (zero,), (zero + 1,), has_aux=True)
        z = jnp.where(width > 0, (goal - mean) / jnp.where(width > 0, width, 1), 0)
        return mean + width * z, memory, z

    x_T = over(points.alpha[0], x0) * x0 + over(points.sigma[0], x0) * noise(first, x0.shape)
    walk = Solver(solver.init, step)
    end, noises = samplers.sample(denoise, walk, points, x_T, rest, cond, keep="x0")
    return Inverted(x_T, noises, x0 - end)
