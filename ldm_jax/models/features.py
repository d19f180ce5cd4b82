"""A perceptual distance on any feature network, and VGG16 as the network that is usually taken.

LPIPS (Zhang et al. 2018, eq. 1): features of layer l, scaled to unit length over their channels,
differ at position p by

    d(x, y) = sum_l mean_p sum_c w_lc (f_lpc(x) - f_lpc(y))^2

with learned weights w >= 0, or w = 1.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

# Width and number of convolutions of each block, Simonyan & Zisserman 2015, table 1, column D.
VGG16_BLOCKS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of RGB in [0, 1]
IMAGENET_STD = (0.229, 0.224, 0.225)
EPS = 1e-8  # keeps the gradient finite where all features of a position are zero


def standardised(x: Float[Array, "b *space 3"]) -> Float[Array, "b *space 3"]:
    """RGB in [-1, 1] -> mean 0 and standard deviation 1 over ImageNet."""
    return ((x + 1) / 2 - jnp.array(IMAGENET_MEAN)) / jnp.array(IMAGENET_STD)


class VGG16Features(nn.Module):
    """The maps relu1_2, 2_2, 3_3, 4_3 and 5_3 of VGG16, for RGB images in [-1, 1]."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w 3"]) -> tuple[Float[Array, "b _h _w _c"], ...]:
        h = standardised(x)
        maps = []
        for i, (width, depth) in enumerate(VGG16_BLOCKS, start=1):
            if i > 1:
                h = nn.max_pool(h, (2, 2), (2, 2))
            for j in range(1, depth + 1):
                h = nn.relu(nn.Conv(width, (3, 3), dtype=self.dtype, name=f"conv{i}_{j}")(h))
            maps.append(h)
        return tuple(maps)


def unit(f: Float[Array, "b *space c"]) -> Float[Array, "b *space c"]:
    f = f.astype(jnp.float32)
    return f * jax.lax.rsqrt(jnp.square(f).sum(-1, keepdims=True) + EPS)


def perceptual_distance(
    features: Callable[[Array], Sequence[Array]],
    x: Float[Array, "b *space c"],
    y: Float[Array, "b *space c"],
    weights: Sequence[Float[Array, " _c"]] | None = None,
) -> Float[Array, " b"]:
    """LPIPS (Zhang et al. 2018, eq. 1) for each sample; 0 where the features agree.

    `features` maps data to one `[b *space c]` array a layer; `weights` has one vector of c numbers
    a layer.

    Raises:
      ValueError: the weights are not as many as the layers.
    """
    fx, fy = features(x), features(y)
    if weights is not None and len(weights) != len(fx):
        raise ValueError(f"{len(weights)} weights for {len(fx)} layers; give one vector a layer")
    total = jnp.zeros(x.shape[0])
    for i, (a, b) in enumerate(zip(fx, fy, strict=True)):
        d = jnp.square(unit(a) - unit(b))
        d = d.sum(-1) if weights is None else d @ weights[i]
        total += d.reshape(d.shape[0], -1).mean(-1)
    return total
