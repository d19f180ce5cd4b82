"""Networks on a torus: every convolution sees the opposite edge where it would see zeros, so that the result tiles.

Done from outside, by an interceptor. Attention without positions, norms over all positions and pooling do not know
where an edge is, so that a network whose convolutions wrap is equivariant to circular shifts (by multiples of its
strides).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float

from ldm_jax.nn import conv, once


def seamless(f: Callable[..., Any], wrap: bool | Sequence[bool] = True) -> Callable[..., Any]:
    """The function, which applies Linen modules, with circular padding along all spatial axes or those with `wrap`.

    Raises:
      ValueError: `wrap` for another number of axes.
    """

    def around(*args, **kwargs):
        def intercept(call, given, named, context):
            if not isinstance(context.module, conv.Conv) or context.method_name != "__call__":
                return call(*given, **named)
            return _wrapped(call, context.module, given[0], wrap)

        with once.every(), nn.intercept_methods(intercept):
            return f(*args, **kwargs)

    return around


def _wrapped(
    call: Callable[..., Any],
    module: conv.Conv,
    x: Float[Array, "b *space c"],
    wrap: bool | Sequence[bool],
) -> Float[Array, "b *out k"]:
    """What a convolution gives of x on a torus: x is continued by more than it pads, and the rest is cut off."""
    rank = x.ndim - 2
    size, stride = conv.per_axis(module.kernel, rank), conv.per_axis(module.stride, rank)
    repeat = conv.per_axis(module.repeat, rank)
    padding = module.padding or [((k - 1) // 2, k // 2) for k in size]
    wraps = conv.per_axis(int(wrap) if isinstance(wrap, bool) else [int(w) for w in wrap], rank)
    margin, starts, ends = [], [0], [x.shape[0]]
    for n, k, s, r, (before, after), on in zip(
        x.shape[1:-1], size, stride, repeat, padding, wraps, strict=True
    ):
        # Whole positions of x and a whole number of strides, so that what is asked for is among the results.
        unit = math.lcm(s, r)
        extra = -(-max(before, after) // unit) * unit if on else 0
        margin.append((extra // r, extra // r))
        starts.append(extra // s)
        ends.append(extra // s + (n * r + before + after - k) // s + 1)
    y = call(jnp.pad(x, [(0, 0), *margin, (0, 0)], mode="wrap"))
    return lax.slice(y, (*starts, 0), (*ends, y.shape[-1]))
