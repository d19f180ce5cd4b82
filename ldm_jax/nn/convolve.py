"""Convolution of arrays [batch, *space, channels], by what is fastest on the device at hand.

XLA's convolution for the CPU is as fast as matrix products where there are many positions, and slow where there are few
and many channels: there the patches are laid out and multiplied as one matrix. A convolution of an array whose every
position stands there twice along an axis multiplies equal numbers with several weights: with the sums of these weights
it takes two products for three (of a picture: 4/9 of all), for the even and the odd positions of the result each.
Accelerators get XLA's own convolution everywhere.
"""

import itertools
from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ldm_jax.nn.attend import platform

X = Float[Array, "b *space c"]
Y = Float[Array, "b *out k"]
Kernel = Float[Array, "*size c k"]
Padding = Sequence[Sequence[int]]  # (before, after) for each axis


def convolve(x: X, kernel: Kernel, stride: Sequence[int], padding: Padding) -> Y:
    """The products of all windows with the kernel; zeros are around x."""
    sizes = zip(x.shape[1:-1], kernel.shape[:-2], stride, padding, strict=True)
    out = [(n + sum(pad) - k) // s + 1 for n, k, s, pad in sizes]
    positions = x.shape[0]
    for n in out:
        positions *= n
    if platform() == "cpu" and positions <= x.shape[-1]:
        return _by_patches(x, kernel, stride, padding, out)
    rank = x.ndim - 2
    axes = tuple(range(1, rank + 1))
    image, weights = (0, rank + 1, *axes), (rank + 1, rank, *range(rank))
    numbers = lax.ConvDimensionNumbers(lhs_spec=image, rhs_spec=weights, out_spec=image)
    return lax.conv_general_dilated(x, kernel, stride, padding, dimension_numbers=numbers)


def _by_patches(x, kernel, stride, padding, out):
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    windows = []
    for at in itertools.product(*map(range, kernel.shape[:-2])):
        ends = [i + (n - 1) * s + 1 for i, n, s in zip(at, out, stride, strict=True)]
        limits = (x.shape[0], *ends, x.shape[-1])
        windows.append(lax.slice(x, (0, *at, 0), limits, (1, *stride, 1)))
    patches = jnp.concatenate(windows, axis=-1)
    return patches @ kernel.reshape(-1, kernel.shape[-1])


def convolve_doubled(x: X, kernel: Kernel, doubled: Sequence[bool]) -> Y:
    """A convolution with a kernel of three along each axis of x with every position twice along those `doubled`.

    The kernel is in the type in which its weights shall be summed; the products are in that of x.
    """

    def along(axis, kernel, padding):
        if axis == len(doubled):
            return convolve(x, kernel.astype(x.dtype), (1,) * axis, padding)
        if not doubled[axis]:
            return along(axis + 1, kernel, (*padding, (1, 1)))
        first, second, third = jnp.split(kernel, 3, axis)
        even = jnp.concatenate([first, second + third], axis)  # reads x[i - 1], x[i], x[i]
        odd = jnp.concatenate([first + second, third], axis)  # reads x[i], x[i], x[i + 1]
        both = [
            along(axis + 1, even, (*padding, (1, 0))),
            along(axis + 1, odd, (*padding, (0, 1))),
        ]
        y = jnp.stack(both, axis + 2)
        return y.reshape(*y.shape[: axis + 1], -1, *y.shape[axis + 3 :])

    return along(0, kernel, ())
