"""Convolution, resampling and the residual block, for arrays [batch, *space, channels] with any number of axes.

A setting that differs by axis, such as a stride, is one int for all axes or a sequence with one int an axis: a video of
[frames, height, width] keeps its frames with a stride of (1, 2, 2).
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from ldm_jax.nn import norms
from ldm_jax.nn.attend import platform
from ldm_jax.nn.convolve import convolve, convolve_doubled

PerAxis = int | Sequence[int]
Init = Callable[..., Any]  # (key, shape, dtype) -> array: how a kernel starts

# Uniform in ±1/√fan_in, torch's default, with which the reference models were trained.
fan_in_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def per_axis(value: PerAxis, rank: int) -> tuple[int, ...]:
    """One int for each of `rank` axes.

    Raises:
      ValueError: a sequence of another length.
    """
    if isinstance(value, int):
        return (value,) * rank
    if len(value) != rank:
        raise ValueError(
            f"{tuple(value)} has {len(value)} values for {rank} spatial axes; give one an axis, or one int"
        )
    return tuple(value)


def total_stride(stride: PerAxis, levels: int) -> int | tuple[int, ...]:
    """The stride between the first and the last of `levels` levels, for all axes or for each."""
    if isinstance(stride, int):
        return stride ** (levels - 1)
    return tuple(s ** (levels - 1) for s in stride)


def check_divisible(space: Sequence[int], factor: PerAxis, what: str) -> None:
    """Raises: ValueError: the factor does not divide the spatial shape; `what` names the factor."""
    if any(size % f for size, f in zip(space, per_axis(factor, len(space)), strict=True)):
        raise ValueError(
            f"{what}, {factor}, does not divide the spatial shape {tuple(space)}; "
            "crop or pad each axis to a multiple of it"
        )


def dense(
    features: int,
    name: str,
    dtype: Any = jnp.float32,
    *,
    bias: bool = True,
    zero: bool = False,
    init: Init = fan_in_uniform,
) -> nn.Dense:
    """A linear layer; with `zero` it starts as the constant zero (`zero_module` of CompVis)."""
    init = nn.initializers.zeros if zero else init
    return nn.Dense(features, use_bias=bias, kernel_init=init, dtype=dtype, name=name)


class Conv(nn.Module):
    """Convolution with zero padding; without `padding` a stride of one keeps the spatial shape.

    With `repeat` every position of x first stands there so often along each axis (`nearest`).
    """

    features: int
    kernel: PerAxis = 3
    stride: PerAxis = 1
    padding: Sequence[Sequence[int]] | None = None  # (before, after) for each axis
    zero: bool = False  # start as the constant zero
    dtype: Any = jnp.float32
    bias: bool = True
    repeat: PerAxis = 1

    @nn.compact
    def __call__(self, x: Float[Array, "b *space c"]) -> Float[Array, "b *out k"]:
        rank = x.ndim - 2
        size, stride = per_axis(self.kernel, rank), per_axis(self.stride, rank)
        init = nn.initializers.zeros if self.zero else fan_in_uniform
        kernel = jnp.asarray(self.param("kernel", init, (*size, x.shape[-1], self.features)))
        bias = 0.0
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        x, repeat = x.astype(self.dtype), per_axis(self.repeat, rank)
        padding = self.padding or [((k - 1) // 2, k // 2) for k in size]
        if max(repeat) > 1:
            plain = size == (3,) * rank and max(stride) == 1 and self.padding is None
            if platform() == "cpu" and plain and max(repeat) == 2:
                return convolve_doubled(x, kernel, [r == 2 for r in repeat]) + bias
            x = nearest(x, repeat)
        return convolve(x, kernel.astype(self.dtype), stride, padding) + bias


def average_pool(x: Float[Array, "b *space c"], stride: PerAxis) -> Float[Array, "b *out c"]:
    """The mean of each block of `stride` positions; the stride must divide the spatial shape."""
    stride = per_axis(stride, x.ndim - 2)
    split = [n for size, s in zip(x.shape[1:-1], stride, strict=True) for n in (size // s, s)]
    y = x.reshape(x.shape[0], *split, x.shape[-1])
    return y.mean(tuple(range(2, y.ndim - 1, 2)))


def nearest(x: Float[Array, "b *space c"], stride: PerAxis) -> Float[Array, "b *out c"]:
    """Every position `stride` times along each axis."""
    stride = per_axis(stride, x.ndim - 2)
    apart = jnp.expand_dims(x, tuple(range(2, 2 * len(stride) + 1, 2)))
    pairs = [n for size, s in zip(x.shape[1:-1], stride, strict=True) for n in (size, s)]
    y = jnp.broadcast_to(apart, (x.shape[0], *pairs, x.shape[-1]))
    sizes = (size * s for size, s in zip(x.shape[1:-1], stride, strict=True))
    return y.reshape(x.shape[0], *sizes, x.shape[-1])


class Downsample(nn.Module):
    """A convolution with a stride that keeps the channels; `Downsample` of CompVis/latent-diffusion."""

    stride: PerAxis = 2
    pad: tuple[int, int] = (
        1,
        1,
    )  # before and after each axis that shrinks; the autoencoder's is (0, 1)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b *space c"]) -> Float[Array, "b *out c"]:
        stride = per_axis(self.stride, x.ndim - 2)
        padding = tuple((1, 1) if s == 1 else self.pad for s in stride)
        return Conv(x.shape[-1], 3, stride, padding, dtype=self.dtype, name="conv")(x)


class Upsample(nn.Module):
    """Nearest neighbours, then a convolution that keeps the channels; `Upsample` of CompVis/latent-diffusion."""

    stride: PerAxis = 2
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b *space c"]) -> Float[Array, "b *out c"]:
        return Conv(x.shape[-1], repeat=self.stride, dtype=self.dtype, name="conv")(x)


class ResBlock(nn.Module):
    """Two convolutions and a skip; `ResBlock` and `ResnetBlock` of CompVis/latent-diffusion.

    h = conv1(silu(norm1(x))) + linear(silu(emb)),  y = skip(x) + conv2(dropout(silu(norm2(h)))). With `scale_shift` the
    embedding gives (a, b) instead, and norm2(h) becomes norm2(h) (1 + a) + b (Dhariwal & Nichol 2021, "adaptive group
    normalisation"). With `resample`, x and silu(norm1(x)) are both halved or doubled before they go on.
    """

    features: int
    groups: int = 32
    eps: float = 1e-5
    scale_shift: bool = False
    resample: Literal["down", "up"] | None = None
    stride: PerAxis = 2  # of `resample`
    dropout: float = 0.0
    zero: bool = True  # start as the skip alone
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b *space c"],
        emb: Float[Array, "b d"] | None = None,
        train: bool = False,
    ) -> Float[Array, "b *out k"]:
        def norm(name):
            return norms.GroupNorm(self.groups, self.eps, self.dtype, name=name)

        def convolution(name, zero=False):
            return Conv(self.features, zero=zero, dtype=self.dtype, name=name)

        h = nn.silu(norm("norm1")(x))
        if self.resample is not None:
            resampled = {"down": average_pool, "up": nearest}[self.resample]
            x, h = resampled(x, self.stride), resampled(h, self.stride)
        h = convolution("conv1")(h)
        if emb is None:
            h = norm("norm2")(h)
        else:
            width = self.features * (2 if self.scale_shift else 1)
            emb = dense(width, "emb", self.dtype)(nn.silu(emb))
            emb = emb.reshape(x.shape[0], *(1,) * (x.ndim - 2), width)
            if self.scale_shift:
                scale, shift = jnp.split(emb, 2, axis=-1)
                h = norm("norm2")(h) * (1 + scale) + shift
            else:
                h = norm("norm2")(h + emb)
        h = nn.Dropout(self.dropout, deterministic=not train)(nn.silu(h))
        h = convolution("conv2", zero=self.zero)(h)
        if x.shape[-1] != self.features:
            x = Conv(self.features, 1, dtype=self.dtype, name="skip")(x)
        return x + h
