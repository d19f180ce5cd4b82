"""DiffEdit (Couairon et al. 2023): where two prompts would denoise the data differently is where the edit goes.

    mask = contrast(...) -> binarised;  way = invert(...);  sample(denoise, followed(solver, way, mask), ...)

Outside of the mask x is, at every level, what inversion found there, so that it ends as it began.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from ldm_jax.diffusion.process import Data, Point, over
from ldm_jax.diffusion.samplers import Solver, Source, noise
from ldm_jax.types import Cond, Denoiser


def contrast(
    denoise: Denoiser, at: Point, x0: Data, rng: Source, cond: Cond, other: Cond, maps: int = 10
) -> Float[Array, "b *space 1"]:
    """How much the estimates of the noise under two conditions differ at a level, on average over `maps` noises.

    (Couairon et al. 2023, section 3.2, step 1; the level is at half of the strength.) `rng` is a key, one a sample, or
    the noises [maps b *space c]. One noise after the other, so that memory does not grow with their number.
    """
    given = jnp.issubdtype(rng.dtype, jnp.floating)
    fold = jax.vmap(jax.random.fold_in, (0, None)) if rng.ndim else jax.random.fold_in
    t = jnp.broadcast_to(at.t, x0.shape[:1])

    def one(source):
        z = noise(source if given else fold(rng, source), x0.shape)
        x = over(at.alpha, x0) * x0 + over(at.sigma, x0) * z
        return jnp.abs(denoise(x, t, cond).eps - denoise(x, t, other).eps).mean(-1, keepdims=True)

    return lax.map(one, rng if given else jnp.arange(maps)).mean(0)


def binarised(
    contrast: Float[Array, "b *space 1"], limit: ArrayLike = 3.0, threshold: ArrayLike = 0.5
) -> Float[Array, "b *space 1"]:
    """The mask: 1 above `threshold` of `limit` times the mean, which cuts outliers off.

    The paper removes outliers and scales to [0, 1] before its threshold of 0.5; the limit of three means is diffusers',
    which takes the mean over the whole batch, where we take that of each sample, which then does not depend on others.
    """
    mean = contrast.mean(tuple(range(1, contrast.ndim)), keepdims=True)
    return (contrast > threshold * limit * mean).astype(contrast.dtype)


def followed(
    solver: Solver, way: Float[Array, "levels b *space c"], mask: Float[Array, "b *space 1"]
) -> Solver:
    """The solver, after each of whose steps x is, where the mask is 0, what `way` has at that level of the grid.

    It counts the steps: on a grid that is `editing.cut` the solver inside is the `editing.resting` one.

    diffusers blends with the level before the step instead, one too noisy, so that what it keeps ends noised.
    """

    def step(denoise, x, p, q, memory, rng):
        inner, i = memory
        after, inner, x0 = solver.step(denoise, x, p, q, inner, rng)
        return mask * after + (1 - mask) * way[i], (inner, i + 1), x0

    return Solver(lambda x: (solver.init(x), jnp.ones((), jnp.int32)), step)
