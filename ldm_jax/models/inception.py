"""Inception-v3 as the Fréchet inception distance needs it: the network of 2015, with the habits of its first authors.

The weights that all published FIDs rest on are those of a TensorFlow graph of December 2015 (1008 classes), ported to
torch as `pt_inception-2015-12-05-6726825d.pth`. That graph differs from Szegedy et al. 2016 and from torchvision's in
three places: averages at the border leave the padding out of their count; the last block's pool takes the largest
value and not the mean; and pictures are (x - 128) / 128 of values in 0..255. Modules have the names of the ported file.

    pool      the mean over the last 8 x 8 positions, 2048 numbers: FID, KID, precision and recall
    spatial   the first 7 channels of Mixed_6d at 17 x 17 positions, 2023 numbers: sFID ("mixed_6/conv:0" of the graph,
              as the evaluator of Dhariwal & Nichol 2021 takes it)
    logits    of the 1008 classes without the last bias: Inception Score

Pictures come in 299 x 299 pixels; how they get that size is part of the metric, see `metrics/resizing.py`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

SIZE = 299
CLASSES = 1008
SPATIAL = 7  # channels

Map = Float[Array, "b _h _w _c"]


class Activations(NamedTuple):
    """What a feature network says of pictures."""

    pool: Float[Array, "b d"]
    spatial: Float[Array, "b s"]
    logits: Float[Array, "b k"]


class ConvUnit(nn.Module):
    """A convolution without bias, the published means and variances, ReLU; in full float32 precision everywhere."""

    width: int
    kernel: tuple[int, int]
    strides: tuple[int, int]
    padding: str

    @nn.compact
    def __call__(self, x: Map) -> Map:
        x = nn.Conv(
            self.width,
            self.kernel,
            self.strides,
            self.padding,
            use_bias=False,
            precision=jax.lax.Precision.HIGHEST,
            name="conv",
        )(x)
        return nn.relu(nn.BatchNorm(use_running_average=True, epsilon=1e-3, name="bn")(x))


def unit(
    x: Map,
    name: str,
    width: int,
    kernel: int | tuple[int, int] = 1,
    stride: int = 1,
    pad: bool = True,
) -> Map:
    """One ConvUnit within the module that is being built; strided ones are not padded."""
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    padding = "SAME" if pad and stride == 1 else "VALID"
    return ConvUnit(width, kernel, (stride, stride), padding, name=name)(x)


def chain(x: Map, name: str, *units: tuple) -> Map:
    """`unit`s one after the other, named NAME_1, NAME_2, ..."""
    for i, of in enumerate(units, start=1):
        x = unit(x, f"{name}_{i}", *of)
    return x


def mean_pool(x: Map) -> Map:
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


def max_pool(x: Map) -> Map:
    return nn.max_pool(x, (3, 3), (1, 1), "SAME")


def halved(x: Map) -> Map:
    return nn.max_pool(x, (3, 3), (2, 2))


def join(*branches: Map) -> Map:
    return jnp.concatenate(branches, axis=-1)


class Mixed5(nn.Module):
    """At 35 x 35 positions."""

    pooled: int

    @nn.compact
    def __call__(self, x: Map) -> Map:
        return join(
            unit(x, "branch1x1", 64),
            chain(x, "branch5x5", (48,), (64, 5)),
            chain(x, "branch3x3dbl", (64,), (96, 3), (96, 3)),
            unit(mean_pool(x), "branch_pool", self.pooled),
        )


class Mixed6a(nn.Module):
    """From 35 x 35 to 17 x 17 positions."""

    @nn.compact
    def __call__(self, x: Map) -> Map:
        return join(
            unit(x, "branch3x3", 384, 3, 2),
            chain(x, "branch3x3dbl", (64,), (96, 3), (96, 3, 2)),
            halved(x),
        )


class Mixed6(nn.Module):
    """At 17 x 17 positions, with kernels of 1 x 7 and 7 x 1."""

    inner: int

    @nn.compact
    def __call__(self, x: Map) -> Map:
        c, wide, tall = self.inner, (1, 7), (7, 1)
        return join(
            unit(x, "branch1x1", 192),
            chain(x, "branch7x7", (c,), (c, wide), (192, tall)),
            chain(x, "branch7x7dbl", (c,), (c, tall), (c, wide), (c, tall), (192, wide)),
            unit(mean_pool(x), "branch_pool", 192),
        )


class Mixed7a(nn.Module):
    """From 17 x 17 to 8 x 8 positions."""

    @nn.compact
    def __call__(self, x: Map) -> Map:
        return join(
            chain(x, "branch3x3", (192,), (320, 3, 2)),
            chain(x, "branch7x7x3", (192,), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)),
            halved(x),
        )


class Mixed7(nn.Module):
    """At 8 x 8 positions."""

    pool: Callable[[Map], Map]

    @nn.compact
    def __call__(self, x: Map) -> Map:
        def fork(x, name):
            return unit(x, f"{name}a", 384, (1, 3)), unit(x, f"{name}b", 384, (3, 1))

        return join(
            unit(x, "branch1x1", 320),
            *fork(unit(x, "branch3x3_1", 384), "branch3x3_2"),
            *fork(chain(x, "branch3x3dbl", (448,), (384, 3)), "branch3x3dbl_3"),
            unit(self.pool(x), "branch_pool", 192),
        )


class InceptionV3(nn.Module):
    """Pictures of 299 x 299 pixels with values in 0..255 -> `Activations`."""

    @nn.compact
    def __call__(self, x: Float[Array, "b 299 299 3"]) -> Activations:
        x = (x - 128) / 128
        x = unit(x, "Conv2d_1a_3x3", 32, 3, 2)
        x = unit(x, "Conv2d_2a_3x3", 32, 3, pad=False)
        x = halved(unit(x, "Conv2d_2b_3x3", 64, 3))
        x = unit(x, "Conv2d_3b_1x1", 80)
        x = halved(unit(x, "Conv2d_4a_3x3", 192, 3, pad=False))
        for letter, pooled in zip("bcd", (32, 64, 64), strict=True):
            x = Mixed5(pooled, name=f"Mixed_5{letter}")(x)
        x = Mixed6a(name="Mixed_6a")(x)
        for letter, inner in zip("bcde", (128, 160, 160, 192), strict=True):
            x = Mixed6(inner, name=f"Mixed_6{letter}")(x)
            if letter == "d":
                spatial = x[..., :SPATIAL].reshape(x.shape[0], -1)
        x = Mixed7a(name="Mixed_7a")(x)
        x = Mixed7(mean_pool, name="Mixed_7b")(x)
        x = Mixed7(max_pool, name="Mixed_7c")(x)
        pool = x.mean((1, 2))
        last = nn.Dense(CLASSES, precision=jax.lax.Precision.HIGHEST, name="fc")
        logits = last(pool) - last(jnp.zeros_like(pool[:1]))  # the file has a bias, the score none
        return Activations(pool, spatial, logits)
