"""Inpainting with a model that was not trained for it: what is known is put back at every noise level.

`blended` replaces the known part of x after each step by the known data at the new level (Song et al. 2021, appendix
I.2; Avrahami et al. 2022, Blended Latent Diffusion). One step does not let the new part fit the known one, which it has
not seen before. RePaint (Lugmayr et al. 2022) repeats steps for that: it noises x again by some levels (`jumping`) and
comes down once more. Here this is a grid that goes back up, so it is the same one loop, of a fixed length.

    sample(denoise, jumping(blended(solver, known, mask)), repaint(points, 10, 10), x_T, ...)
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from ldm_jax.diffusion.process import Data, Point, over, transition
from ldm_jax.diffusion.samplers import Solver, noise


def blended(
    solver: Solver, known: Data, mask: Float[Array, "b *space 1"], eps: Data | None = None
) -> Solver:
    """The solver, after each of whose steps x is the noised `known` where the mask is 0.

    The noise is `eps`, one for all levels (as in diffusers; it belongs to solvers without noise), or new at each level
    (RePaint, eq. 8a), drawn from the solver's source: it is used where the solver's own is not. At clean data the known
    part is exactly the known; on a grid that ends before, `editing.composite` the latents.
    """

    def step(denoise, x, p, q, memory, rng):
        after, memory, x0 = solver.step(denoise, x, p, q, memory, rng)
        z = noise(rng, x.shape, x.dtype) if eps is None else eps
        there = over(q.alpha, x) * known + over(q.sigma, x) * z
        return mask * after + (1 - mask) * there, memory, x0

    return Solver(solver.init, step)


def jumping(solver: Solver) -> Solver:
    """The solver, but a step to a noisier level adds the noise between them (RePaint, Algorithm 1, line 10).

    There no network is asked, and a solver that remembers steps begins anew.
    """

    def step(denoise, x, p, q, memory, rng):
        up = jnp.all(q.sigma * p.alpha > p.sigma * q.alpha)

        def jump():
            scale, variance = transition(q, p)
            z = noise(rng, x.shape, x.dtype)
            y = over(scale, x) * x + over(jnp.sqrt(variance), x) * z
            return y, solver.init(y), x

        return lax.cond(up, jump, lambda: solver.step(denoise, x, p, q, memory, rng))

    return Solver(solver.init, step)


def repaint(points: Point, jump: int = 10, times: int = 10) -> Point:
    """The grid on which each stretch of `jump` steps is walked `times` times (Lugmayr et al. 2022, j and r).

    Going up is one step, whatever its length: q(x_t | x_s) is the same as by single steps. The network is asked in the
    others, about `times` as many as the grid has.

    Raises:
      ValueError: a jump that is not shorter than the grid, or fewer than one time.
    """
    steps = points.t.shape[0] - 1
    levels_fit(steps, jump, times)
    index = levels(steps, jump, times)
    return Point(*(jnp.asarray(a)[index] for a in points))


def levels_fit(steps: int, jump: int, times: int) -> None:
    """Raises: ValueError: a jump that is not shorter than a grid of so many steps, or fewer than one time."""
    if not 1 <= jump < steps or times < 1:
        raise ValueError(
            f"jump={jump} and times={times} do not fit a grid of {steps} steps; "
            f"give 1 <= jump < {steps} and times >= 1"
        )


def levels(steps: int, jump: int, times: int) -> np.ndarray:
    """The levels of `repaint`, as entries of the grid: 0 is its noisy end."""
    # Steps that are left where it jumps; the last one, to clean data, is never repeated, as in the paper's schedule.
    again = dict.fromkeys(range(1, steps - jump + 1, jump), times - 1)
    left, found = steps, [0]
    while left:
        left -= 1
        found.append(steps - left)
        if again.get(left):
            again[left] -= 1
            left += jump
            found.append(steps - left)
    return np.array(found)
