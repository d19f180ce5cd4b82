"""Attention between the positions of an array, and from positions to tokens, with any number of spatial dimensions.

Positions are the spatial axes laid out in a row, so nothing here knows how many axes there are. `AttentionBlock` is the
block of the autoencoder and of the unconditional U-Nets; `SpatialTransformer` is the block through which tokens enter a
U-Net (Rombach et al. 2022, section 3.3). What they share is `attend`, whose kernel depends on the device.
"""

from typing import Any, Literal

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from ldm_jax.nn import conv, norms, once
from ldm_jax.nn.attend import attend

LAYER_NORM_EPS = 1e-5  # torch's, where flax has 1e-6


class Attention(nn.Module):
    """Multi-head attention with projections; reads `tokens`, or its own input where there are none."""

    heads: int
    head_dim: int
    bias: bool = False  # on q, k and v; `out` always has one
    zero: bool = False  # start with an output of zero
    dtype: Any = jnp.float32
    causal: bool = False  # a position does not see those after it
    kernel_init: conv.Init = conv.fan_in_uniform  # of q, k and v
    out_init: conv.Init = conv.fan_in_uniform

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n c"],
        tokens: Float[Array, "b m d"] | None = None,
        mask: Bool[Array, "b m"] | None = None,
    ) -> Float[Array, "b n c"]:
        source = x if tokens is None else tokens

        def project(name, y):
            width = self.heads * self.head_dim
            y = conv.dense(width, name, self.dtype, bias=self.bias, init=self.kernel_init)(y)
            return y.reshape(*y.shape[:2], self.heads, self.head_dim)

        q, k, v = project("q", x), project("k", source), project("v", source)
        y = self.mix(q, k, v, mask)
        out = conv.dense(x.shape[-1], "out", self.dtype, zero=self.zero, init=self.out_init)
        return out(y.reshape(*x.shape[:2], -1))

    def mix(
        self,
        q: Float[Array, "b n h d"],
        k: Float[Array, "b m h d"],
        v: Float[Array, "b m h d"],
        mask: Bool[Array, "b m"] | None,
    ) -> Float[Array, "b n h d"]:
        """The values that each query reads; a method so that `taps` can see and change it from outside."""
        return attend(q, k, v, mask, self.causal)


class AttentionBlock(nn.Module):
    """`x + out(attention(norm(x)))` over all positions; `AttentionBlock` and `AttnBlock` of CompVis."""

    heads: int = 1
    groups: int = 32
    eps: float = 1e-5
    zero: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b *space c"]) -> Float[Array, "b *space c"]:
        """Raises: ValueError: the heads do not divide the channels."""
        channels = x.shape[-1]
        head_dim = dim_of_head(channels, self.heads)
        h = norms.GroupNorm(self.groups, self.eps, self.dtype, name="norm")(x)
        h = h.reshape(x.shape[0], -1, channels)
        attention = Attention(self.heads, head_dim, True, self.zero, self.dtype, name="attn")
        return x + attention(h).reshape(x.shape)


def dim_of_head(channels: int, heads: int) -> int:
    if channels % heads:
        raise ValueError(f"{heads} heads do not divide {channels} channels; choose heads that do")
    return channels // heads


class FeedForward(nn.Module):
    """GEGLU, `out(a · gelu(b))` with a and b four times as wide as x (Shazeer 2020, eq. 6), with the exact GELU."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        channels = x.shape[-1]
        value, gate = jnp.split(conv.dense(8 * channels, "in", self.dtype)(x), 2, axis=-1)
        h = value * nn.gelu(gate, approximate=False)
        return conv.dense(channels, "out", self.dtype)(h)


class TransformerBlock(nn.Module):
    """Attention over positions, attention to tokens, feed-forward; `BasicTransformerBlock` of CompVis.

    With `only_cross` the first attention reads the tokens too (diffusers' `only_cross_attention`).
    """

    heads: int
    head_dim: int
    dropout: float = 0.0
    dtype: Any = jnp.float32
    only_cross: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n c"],
        tokens: Float[Array, "b m d"] | None = None,
        mask: Bool[Array, "b m"] | None = None,
        train: bool = False,
    ) -> Float[Array, "b n c"]:
        def norm(name):
            return nn.LayerNorm(epsilon=LAYER_NORM_EPS, dtype=self.dtype, name=name)

        def drop(h):
            return nn.Dropout(self.dropout, deterministic=not train)(h)

        def attention(name):
            return Attention(self.heads, self.head_dim, dtype=self.dtype, name=name)

        first = (tokens, mask) if self.only_cross else ()
        x = x + drop(attention("self_attn")(norm("norm_self")(x), *first))
        x = x + drop(attention("cross_attn")(norm("norm_cross")(x), tokens, mask))
        return x + drop(FeedForward(self.dtype, name="ff")(norm("norm_ff")(x)))


class SpatialTransformer(nn.Module):
    """A transformer over all positions that reads tokens; `SpatialTransformer` of CompVis/latent-diffusion.

    `projection` says how the kernels of `proj_in` and `proj_out` are stored: as 1x1 convolutions (Stable Diffusion 1)
    or as matrices (2 and XL). The mathematics is the same.
    """

    heads: int
    depth: int = 1
    projection: Literal["conv", "linear"] = "conv"
    groups: int = 32
    dropout: float = 0.0
    dtype: Any = jnp.float32
    remat: bool | str = (
        False  # recompute each transformer block in the backward pass; or a name of `once.KEEP`
    )
    only_cross: bool = False  # no attention between positions: both attentions read tokens

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b *space c"],
        tokens: Float[Array, "b m d"] | None = None,
        mask: Bool[Array, "b m"] | None = None,
        train: bool = False,
    ) -> Float[Array, "b *space c"]:
        """Raises: ValueError: the heads do not divide the channels."""
        channels = x.shape[-1]
        head_dim = dim_of_head(channels, self.heads)

        def project(name, y, zero=False):
            if self.projection == "linear":
                return conv.dense(channels, name, self.dtype, zero=zero)(y)
            return conv.Conv(channels, 1, zero=zero, dtype=self.dtype, name=name)(y)

        h = project("proj_in", norms.GroupNorm(self.groups, 1e-6, self.dtype, name="norm")(x))
        h = h.reshape(x.shape[0], -1, channels)
        block = once.once(TransformerBlock, self.remat, (4,))
        for i in range(self.depth):
            settings = (self.heads, head_dim, self.dropout, self.dtype, self.only_cross)
            h = block(*settings, name=f"block_{i}")(h, tokens, mask, train)
        return x + project("proj_out", h.reshape(x.shape), zero=True)
