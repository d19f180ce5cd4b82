"""Blocks of which a network has many: those that are alike are traced once."""

import contextlib
import contextvars
import functools
from collections.abc import Iterator, Sequence

import jax
from flax import linen as nn

# What a block that is computed anew in the backward pass keeps of the forward pass, by jax's own names.
KEEP = {
    "dots_saveable": jax.checkpoint_policies.dots_saveable,  # all products and convolutions
    "dots_with_no_batch_dims_saveable": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # of dense layers
}
_EVERY = contextvars.ContextVar("every", default=False)


def once(
    block: type[nn.Module], remat: bool | str = False, static: Sequence[int] = ()
) -> type[nn.Module]:
    """The same module, of which all with the same settings and the same shapes share one trace (`nn.jit`).

    Stable Diffusion XL has 70 transformer blocks of three kinds: tracing its gradient takes a quarter of the time.
    Names, parameters and results stay, and XLA sees the same program, since it inlines calls. `remat` computes the
    block anew in the backward pass (Chen et al. 2016): all of it, or but for what a name of `KEEP` keeps. `static` are
    the arguments that are no arrays, counted from 1.

    A method that is intercepted within (`nn.intercept_methods`) is intercepted where the block is traced, not at every
    place where it stands; `every` makes that the same.

    Raises:
      ValueError: an unknown name.
    """
    if isinstance(remat, str) and remat not in KEEP:
        raise ValueError(
            f"remat = {remat!r} is unknown; choose True, False or one of {sorted(KEEP)}"
        )
    return block if _EVERY.get() else _shared(block, remat, tuple(static))


@functools.cache
def _shared(block, remat, static):
    made = block
    if remat:
        made = nn.remat(block, static_argnums=static, policy=KEEP.get(remat))
    return nn.jit(made, static_argnums=static)


@contextlib.contextmanager
def every() -> Iterator[None]:
    """Within it every block is traced by itself, wherever it stands, and `remat` is not heeded.

    For what looks into a network or changes it (`taps`). A function that jit has traced without it stays as it was
    traced: give jit another function.
    """
    token = _EVERY.set(True)
    try:
        yield
    finally:
        _EVERY.reset(token)
