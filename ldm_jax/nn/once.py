"""Blocks of which a network has many: those that are alike are traced once."""

import functools
from collections.abc import Sequence

from flax import linen as nn


@functools.cache
def once(
    block: type[nn.Module], remat: bool = False, static: Sequence[int] = ()
) -> type[nn.Module]:
    """The same module, of which all with the same settings and the same shapes share one trace (`nn.jit`).

    Stable Diffusion XL has 70 transformer blocks of three kinds: tracing its gradient takes a quarter of the time.
    Names, parameters and results stay, and XLA sees the same program, since it inlines calls. `remat` computes the
    block anew in the backward pass. `static` are the arguments that are no arrays, counted from 1.

    A method that is intercepted within (`nn.intercept_methods`) is intercepted where the block is traced, not at every
    place where it stands.
    """
    made = nn.remat(block, static_argnums=static) if remat else block
    return nn.jit(made, static_argnums=static)
