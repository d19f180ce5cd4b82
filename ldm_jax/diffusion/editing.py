"""What all edits of given data are made of: where the walk begins, and what of the data stays as it was.

An edit is `samplers.sample` from another start (`noised`), on another grid (`cut`, `inpainting.repaint`) or with a
solver that is wrapped (`resting`, `inpainting.blended`): denoisers, guidance and the one loop know nothing of edits.
Masks are [b *space 1]: 1 is where something new is made, 0 is what is kept.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from ldm_jax.diffusion.process import Data, Point, over
from ldm_jax.diffusion.samplers import Solver


def taken(steps: int, strength: float | Sequence[float]) -> np.ndarray:
    """How many of `steps` a strength in (0, 1] takes, one or one a sample: int(steps * strength).

    Raises:
      ValueError: a strength outside of (0, 1], or one that takes no step.
    """
    every = np.nan_to_num(np.asarray(strength, np.float64))
    found = np.asarray(np.minimum((steps * every).astype(np.int32), steps))
    if ((every <= 0) | (every > 1) | (found < 1)).any():
        raise ValueError(
            f"strength={strength} must be in (0, 1], and strength * steps = {steps * every} at least 1"
        )
    return found


def cut(points: Point, steps: ArrayLike) -> Point:
    """The grid that begins `steps` (one, or one a sample, [b]; may be traced) before its end, as long as it was.

    It stands at its first level until then: walk it with `resting`. As long as before, so that no strength compiles.
    """
    n = points.t.shape[0]
    left_out = n - 1 - jnp.asarray(steps)
    index = jnp.maximum(jnp.arange(n).reshape((n,) + (1,) * left_out.ndim), left_out)

    def at(a):
        a = jnp.asarray(a)
        if a.ndim == 1:
            return a[index]
        return jnp.take_along_axis(a, jnp.broadcast_to(index.reshape(n, -1), a.shape), 0)

    return Point(*map(at, points))


def resting(solver: Solver) -> Solver:
    """The solver, but a step from a noise level to the same one asks no network and leaves x as it is.

    Raises:
      ValueError: levels that differ by sample, with a solver whose memory is not one a sample.
    """

    def step(denoise, x, p, q, memory, rng):
        moves = (p.alpha != q.alpha) | (p.sigma != q.sigma)

        def go():
            after = solver.step(denoise, x, p, q, memory, rng)
            if not moves.ndim:
                return after
            return jax.tree.map(lambda a, b: _choose(moves, a, b), after, (x, memory, x))

        return lax.cond(jnp.any(moves), go, lambda: (x, memory, x))

    return Solver(solver.init, step)


def _choose(moves: Array, after: Array, before: Array) -> Array:
    if not after.ndim or after.shape[0] != len(moves):
        raise ValueError(
            "this solver's memory is shared by the samples, so that they cannot begin at different levels; "
            "use one strength for all, or a solver of one step"
        )
    return jnp.where(over(moves, after), after, before)


def noised(points: Point, x0: Data, eps: Data) -> Data:
    """Data at the first level of a grid: alpha x0 + sigma eps (SDEdit, Meng et al. 2022)."""
    return over(points.alpha[0], x0) * x0 + over(points.sigma[0], x0) * eps


def composite(original: Any, changed: Any, mask: Any) -> Any:
    """The change where the mask is 1, the original, to the bit, where it is 0, a mixture between."""
    return mask * changed + (1 - mask) * original


def shrunk(mask: Float[Any, "b *space 1"], factor: int) -> Float[Any, "b *small 1"]:
    """A mask of data on the grid of latents: 1 wherever any of the positions that a latent stands for is.

    So that a latent which saw something of what goes away is made anew. diffusers takes the first position of each
    block instead, which is `mask[:, ::factor, ::factor]`.
    """
    split = [n for size in mask.shape[1:-1] for n in (size // factor, factor)]
    return mask.reshape(mask.shape[0], *split, 1).max(tuple(range(2, 2 * (mask.ndim - 1), 2)))


def padded(
    x: Float[np.ndarray, "b *space c"], margins: Sequence[tuple[int, int]]
) -> tuple[Float[np.ndarray, "b *large c"], Float[np.ndarray, "b *large 1"]]:
    """Data with margins (before, after) along each axis, for outpainting, and the mask of the margins.

    The margins repeat the outermost values, so that an encoder sees no edge where there will be none.

    Raises:
      ValueError: margins for another number of axes, or negative ones.
    """
    pairs = [tuple(pair) for pair in margins]
    if len(pairs) != x.ndim - 2 or any(n < 0 for pair in pairs for n in pair):
        raise ValueError(
            f"margins {pairs} do not fit data of shape {x.shape}; give (before, after), at least 0, for each axis"
        )
    width = [(0, 0), *pairs, (0, 0)]
    known = np.zeros((*x.shape[:-1], 1), np.float32)
    return np.pad(x, width, mode="edge"), np.pad(known, width, constant_values=1)


def enlarged(
    x: Float[Array, "b *space c"], space: Sequence[int], method: str = "linear"
) -> Float[Array, "b *large c"]:
    """Data or latents at another size, from where a second pass at this size begins: `noised` and walked down.

    `method` is one of `jax.image.resize`.
    """
    return jax.image.resize(x, (x.shape[0], *space, x.shape[-1]), method, antialias=False)
