"""Blocks of which a network has many: those that are alike are traced once."""

import contextlib
import contextvars
import functools
from collections.abc import Iterator, Sequence

from flax import linen as nn

_EVERY = contextvars.ContextVar("every", default=False)


def once(
    block: type[nn.Module], remat: bool = False, static: Sequence[int] = ()
) -> type[nn.Module]:
    """The same module, of which all with the same settings and the same shapes share one trace (`nn.jit`).

    Stable Diffusion XL has 70 transformer blocks of three kinds: tracing its gradient takes a quarter of the time.
    Names, parameters and results stay, and XLA sees the same program, since it inlines calls. `remat` computes the
    block anew in the backward pass. `static` are the arguments that are no arrays, counted from 1.

    A method that is intercepted within (`nn.intercept_methods`) is intercepted where the block is traced, not at every
    place where it stands; `every` makes that the same.
    """
    return block if _EVERY.get() else _shared(block, remat, tuple(static))


@functools.cache
def _shared(block, remat, static):
    made = nn.remat(block, static_argnums=static) if remat else block
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
