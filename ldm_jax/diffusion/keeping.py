"""What of given data stays as it was while a solver walks: the wrappers of edits, in the order that they need."""

from jaxtyping import Array, Float

from ldm_jax.diffusion import diffedit, editing, inpainting
from ldm_jax.diffusion.process import Data
from ldm_jax.diffusion.samplers import Solver


def keeping(
    solver: Solver,
    known: Data | None = None,
    mask: Float[Array, "b *space 1"] | None = None,
    eps: Data | None = None,
    way: Float[Array, "levels b *space c"] | None = None,
) -> Solver:
    """The solver on a grid that is `editing.cut`, and may go back up; it keeps nothing, or what lies outside the mask.

    `known` and maybe `eps` are those of `inpainting.blended`, `way` that of `diffedit.followed`.
    """
    if way is not None:  # it counts the steps, also those that rest
        return diffedit.followed(editing.resting(solver), way, mask)
    if mask is not None:
        solver = inpainting.jumping(inpainting.blended(solver, known, mask, eps))
    return editing.resting(solver)
