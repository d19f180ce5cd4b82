"""The diffusion transformer (DiT, Peebles & Xie 2023): a noisy array and its time to the output F of the network.

Patches of x become tokens, which know where they are by fixed sinusoids; blocks of attention and feed-forward networks
follow, all of one width; a linear layer turns every token back into a patch. Time and the condition's vector are added,
and steer every block through its norms (`nn.modulated`). The layers are those of `DiT` in facebookresearch/DiT, for any
number of spatial axes and any size: positions are computed instead of stored, which is all by which the number of
parameters differs from the paper's.

|    | width | depth | heads |
|----|-------|-------|-------|
| S  | 384   | 12    | 6     |
| B  | 768   | 12    | 12    |
| L  | 1024  | 24    | 16    |
| XL | 1152  | 28    | 16    |

"XL/2" has patches of 2 x 2.
"""

import math
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from ldm_jax.nn import attention, conv, embeddings, modulated, once
from ldm_jax.types import Cond

WAVES = 256  # the width of the sinusoids of time
normal = nn.initializers.normal(0.02)


class Patches(nn.Module):
    """Every patch of x by one linear layer: a convolution whose kernel and stride are the patch."""

    features: int
    patch: conv.PerAxis
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b *space c"]) -> Float[Array, "b *grid k"]:
        size = conv.per_axis(self.patch, x.ndim - 2)
        rows = math.prod(size) * x.shape[-1]

        def init(key, shape, dtype=jnp.float32):  # as the matrix that it is
            return modulated.xavier(key, (rows, self.features), dtype).reshape(shape)

        kernel = self.param("kernel", init, (*size, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        kernel = jnp.asarray(kernel, self.dtype).reshape(rows, self.features)
        return split(x.astype(self.dtype), size) @ kernel + jnp.asarray(bias, self.dtype)


def split(x: Float[Array, "b *space c"], patch: tuple[int, ...]) -> Float[Array, "b *grid k"]:
    """The positions of each patch as channels, k = (*patch, c) in this order."""
    rank = len(patch)
    pairs = [n for size, p in zip(x.shape[1:-1], patch, strict=True) for n in (size // p, p)]
    y = x.reshape(x.shape[0], *pairs, x.shape[-1])
    order = (0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2), 2 * rank + 1)
    return y.transpose(order).reshape(x.shape[0], *pairs[::2], -1)


def joined(y: Float[Array, "b *grid k"], patch: tuple[int, ...]) -> Float[Array, "b *space c"]:
    """The inverse of `split`."""
    rank, grid = len(patch), y.shape[1:-1]
    y = y.reshape(y.shape[0], *grid, *patch, -1)
    order = (0, *(i for axis in range(1, rank + 1) for i in (axis, rank + axis)), 2 * rank + 1)
    space = (n * p for n, p in zip(grid, patch, strict=True))
    return y.transpose(order).reshape(y.shape[0], *space, -1)


class DiT(nn.Module):
    """`DiT` of facebookresearch/DiT. Its classes are a `Label` conditioner's, as wide as the network.

    Raises:
      ValueError: heads that do not divide the width.
    """

    width: int
    depth: int  # blocks
    heads: int  # of attention
    patch: conv.PerAxis = 2
    ratio: int = 4  # how much wider the feed-forward networks are
    variance: bool = False  # twice the channels: F, then what `diffusion.learned` reads
    out_channels: int | None = None  # of F; None: as many as x has
    dtype: Any = jnp.float32
    remat: bool | str = False  # recompute each block in the backward pass; or a name of `once.KEEP`

    def __post_init__(self):
        super().__post_init__()
        attention.dim_of_head(self.width, self.heads)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b *space c"],
        t: Float[Array, " b"],
        cond: Cond = Cond(),  # noqa: B008 (it holds nothing)
        train: bool = False,
    ) -> Float[Array, "b *space k"]:
        """F(x, t, cond) in float32; t as it was trained on, for example [0, 999].

        The condition's vector, as wide as the network, is added to the embedding of time; `spatial` is joined to the
        channels of x. There is no drop-out, so `train` changes nothing.

        Raises:
          ValueError: a spatial shape that the patches do not divide, or a condition that does not fit.
        """
        check(self, x, cond)
        patch = conv.per_axis(self.patch, x.ndim - 2)
        channels = (self.out_channels or x.shape[-1]) * (2 if self.variance else 1)
        emb = embeddings.MLP(self.width, self.dtype, normal, name="time")(
            embeddings.sinusoid(t, WAVES)
        )
        if cond.vector is not None:
            emb = emb + cond.vector.astype(emb.dtype)
        if cond.spatial is not None:
            x = jnp.concatenate([x, cond.spatial.astype(x.dtype)], axis=-1)
        h = Patches(self.width, patch, self.dtype, name="patches")(x)
        h = h + jnp.asarray(embeddings.places(h.shape[1:-1], self.width), self.dtype)
        block = once.once(modulated.Block, self.remat)
        for i in range(self.depth):
            h = block(self.heads, self.ratio, self.dtype, name=f"block_{i}")(h, emb)
        last = modulated.Last(math.prod(patch) * channels, self.dtype, name="last")
        return joined(last(h, emb), patch).astype(jnp.float32)


def check(dit: DiT, x: Array, cond: Cond) -> None:
    """Raises: ValueError: a spatial shape that the patches do not divide, or a condition that does not fit."""
    conv.check_divisible(x.shape[1:-1], dit.patch, "the patch of this DiT")
    if cond.tokens is not None or cond.mask is not None:
        raise ValueError(
            "the condition has tokens and a DiT has no cross-attention; give it a vector (a Label with into='vector'), "
            "or use unet.UNet"
        )
    if cond.residuals is not None or cond.controls:
        raise ValueError(
            "the condition has residuals or controls of a ControlNet, which are for U-Nets; leave them out"
        )
    if cond.vector is not None and cond.vector.shape[-1] != dit.width:
        raise ValueError(
            f"this DiT adds a vector of its own width {dit.width} and the condition's has width "
            f"{cond.vector.shape[-1]}; set the conditioner's width={dit.width}"
        )
    if cond.spatial is not None and cond.spatial.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"the spatial condition has shape {cond.spatial.shape} and x has {x.shape}; "
            "all axes but the channels must agree"
        )
