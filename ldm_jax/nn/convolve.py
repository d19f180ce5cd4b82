"""Convolution of arrays [batch, *space, channels], by what is fastest on the device at hand.

XLA's convolution for the CPU is as fast as matrix products where there are many positions, and slow where there are few
and many channels: there the patches are laid out and multiplied as one matrix. Elsewhere work is saved, in float32:

- A kernel of three gives two neighbours, which read four positions, by four products instead of six (Winograd 1980;
  Lavin & Gray 2016, eqs. 5 and 6), along one axis: of sums of positions with sums of weights.
- A convolution of an array whose every position stands there twice along an axis multiplies equal numbers with several
  weights. With weights (a, b, c) the even results are x[i-1] a + x[i] (b + c) and the odd ones x[i] (a + b) + x[i+1] c:
  four products for six. With s = a + b + c they are x[i] s + (x[i-1] - x[i]) a and x[i] s + (x[i+1] - x[i]) c: three.

The results are the same up to rounding. Where a derivative is taken the work is not saved: a train step (batch 64)
gained nothing and took 1.4 times as long to compile. Accelerators get XLA's own convolution everywhere.
"""

import functools
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ldm_jax.nn.attend import platform

X = Float[Array, "b *space c"]
Y = Float[Array, "b *out k"]
Kernel = Float[Array, "*size c k"]
Padding = Sequence[Sequence[int]]  # (before, after) for each axis

# Channels from which saved products are worth the sums that they take (measured: 64 are, 32 are not) ...
CHANNELS = 48
# ... and elements of an array up to which all of its axes have differences; the sums of larger ones leave the cache.
SMALL = 2**20


def convolve(x: X, kernel: Kernel, stride: Sequence[int], padding: Padding) -> Y:
    """The products of all windows with the kernel; zeros are around x."""
    once = max(stride) == 1
    if once and max(kernel.shape[:-2]) == 1 and not any(map(any, padding)):
        # A matrix product is faster than a convolution with a kernel of one on the CPU.
        return x @ kernel.reshape(kernel.shape[-2:])
    sizes = zip(x.shape[1:-1], kernel.shape[:-2], stride, padding, strict=True)
    out = [(n + sum(pad) - k) // s + 1 for n, k, s, pad in sizes]
    if platform() == "cpu":
        if x.shape[0] * math.prod(out) <= x.shape[-1]:
            return _by_patches(x, kernel, stride, padding, out)
        paired = [i for i, k in enumerate(kernel.shape[:-2]) if k == 3 and out[i] % 2 == 0]
        if once and paired and _saves(x, kernel):
            by_pairs = functools.partial(_by_pairs, padding=padding, axis=paired[0])
            whole = functools.partial(_plain, stride=stride, padding=padding)
            return _without_derivative(by_pairs, whole)(x, kernel)
    return _plain(x, kernel, stride, padding)


def _plain(x, kernel, stride, padding):
    rank = x.ndim - 2
    axes = tuple(range(1, rank + 1))
    image, weights = (0, rank + 1, *axes), (rank + 1, rank, *range(rank))
    numbers = lax.ConvDimensionNumbers(lhs_spec=image, rhs_spec=weights, out_spec=image)
    return lax.conv_general_dilated(x, kernel, stride, padding, dimension_numbers=numbers)


def _saves(x, kernel):
    return x.dtype == jnp.float32 and min(kernel.shape[-2:]) >= CHANNELS


def _without_derivative(saving, whole):
    """`saving(x, kernel)`, and the same by `whole` where a derivative is taken."""
    f = jax.custom_jvp(saving)
    f.defjvp(lambda given, tangents: jax.jvp(whole, given, tangents))
    return f


def _by_patches(x, kernel, stride, padding, out):
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    windows = []
    for at in itertools.product(*map(range, kernel.shape[:-2])):
        ends = [i + (n - 1) * s + 1 for i, n, s in zip(at, out, stride, strict=True)]
        limits = (x.shape[0], *ends, x.shape[-1])
        windows.append(lax.slice(x, (0, *at, 0), limits, (1, *stride, 1)))
    patches = jnp.concatenate(windows, axis=-1)
    return patches @ kernel.reshape(-1, kernel.shape[-1])


def _by_pairs(x, kernel, padding, axis):
    """Two results along an axis by four products: x is [*, 2 n + 2, *] there with its padding, the result 2 n."""
    along = axis + 1  # of x
    length = x.shape[along] + sum(padding[axis])
    x = jnp.pad(x, [padding[axis] if i == along else (0, 0) for i in range(x.ndim)])
    inner = [(0, 0) if i == axis else tuple(pad) for i, pad in enumerate(padding)]
    x_0, x_1, x_2, x_3 = (lax.slice_in_dim(x, i, length - 3 + i, 2, along) for i in range(4))
    first, second, third = jnp.split(kernel, 3, axis)
    outer, middle = (first + third) / 2, second / 2

    def product(x, kernel):
        return _plain(x, kernel, (1,) * (x.ndim - 2), inner)

    y_0, y_3 = product(x_0 - x_2, first), product(x_1 - x_3, third)
    y_1, y_2 = product(x_1 + x_2, outer + middle), product(x_2 - x_1, outer - middle)
    return _interleaved(y_0 + y_1 + y_2, y_1 - y_2 - y_3, along)


def _interleaved(even, odd, axis):
    y = jnp.stack([even, odd], axis + 1)
    return y.reshape(*y.shape[:axis], -1, *y.shape[axis + 2 :])


def convolve_doubled(x: X, kernel: Kernel, doubled: Sequence[bool]) -> Y:
    """A convolution with a kernel of three along each axis of x with every position twice along those `doubled`.

    The kernel is in the type in which its weights shall be summed; the products are in that of x. Differences are taken
    in float32 only, along the first of these axes, or along all where x is small.
    """
    by_parity = functools.partial(_doubled, doubled=doubled, padding=(), differences=0)
    if not _saves(x, kernel):
        return by_parity(x, kernel)
    ways = list(doubled).count(True) if x.size <= SMALL else 1
    saving = functools.partial(_doubled, doubled=doubled, padding=(), differences=ways)
    return _without_derivative(saving, by_parity)(x, kernel)


def _doubled(x, kernel, doubled, padding, differences):
    """The axes from the `len(padding)`-th on; those before are done. So many of them have differences."""
    axis = len(padding)
    if axis == len(doubled):
        return convolve(x, kernel.astype(x.dtype), (1,) * axis, padding)
    if not doubled[axis]:
        return _doubled(x, kernel, doubled, (*padding, (1, 1)), differences)
    first, second, third = jnp.split(kernel, 3, axis)
    if differences:

        def product(x, kernel):
            return _doubled(x, kernel, doubled, (*padding, (0, 0)), differences - 1)

        n = x.shape[axis + 1]
        wide = jnp.pad(x, [(1, 1) if i == axis + 1 else (0, 0) for i in range(x.ndim)])
        before, here, after = (lax.slice_in_dim(wide, i, i + n, 1, axis + 1) for i in range(3))
        both = product(here, first + second + third)
        even = both + product(before - here, first)
        odd = both + product(after - here, third)
    else:

        def product(x, kernel, *pad):
            return _doubled(x, kernel, doubled, (*padding, pad), 0)

        even = product(x, jnp.concatenate([first, second + third], axis), 1, 0)
        odd = product(x, jnp.concatenate([first + second, third], axis), 0, 1)
    return _interleaved(even, odd, axis + 1)
