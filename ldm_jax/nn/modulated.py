"""Transformer blocks that a vector steers through their norms: adaLN-zero (Peebles & Xie 2023, section 3.2).

    x + gate attend(norm(x) (1 + scale) + shift),    then the same with a feed-forward network

where one linear layer makes shifts, scales and gates of the vector. It starts at zero, and every block as the identity.
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from ldm_jax.nn import attention, conv

EPS = 1e-6
# Glorot & Bengio 2010, as the reference model starts; q, k and v as one matrix of three times the rows.
xavier = nn.initializers.xavier_uniform()
xavier_third = nn.initializers.variance_scaling(1 / 2, "fan_avg", "uniform")


def norm(dtype: Any) -> nn.LayerNorm:
    """A layer norm without parameters of its own."""
    return nn.LayerNorm(epsilon=EPS, use_bias=False, use_scale=False, dtype=dtype)


def modulate(
    x: Float[Array, "b n c"], shift: Float[Array, "b 1 c"], scale: Float[Array, "b 1 c"]
) -> Float[Array, "b n c"]:
    return x * (1 + scale) + shift


def steering(
    emb: Float[Array, "b d"], parts: int, features: int, dtype: Any
) -> list[Float[Array, "b 1 c"]]:
    """So many vectors of a block's own, from the one that all blocks read; makes the layer "modulation"."""
    made = conv.dense(parts * features, "modulation", dtype, zero=True)(nn.silu(emb))
    return jnp.split(made[:, None], parts, axis=-1)


class FeedForward(nn.Module):
    """Linear, GELU (its tanh approximation), linear."""

    ratio: int = 4  # how much wider than x the middle is
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        channels = x.shape[-1]
        h = conv.dense(self.ratio * channels, "in", self.dtype, init=xavier)(x)
        return conv.dense(channels, "out", self.dtype, init=xavier)(nn.gelu(h, approximate=True))


class Block(nn.Module):
    """Attention between all positions and a feed-forward network; `DiTBlock` of facebookresearch/DiT."""

    heads: int
    ratio: int = 4  # of the feed-forward network
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b *space c"], emb: Float[Array, "b d"]
    ) -> Float[Array, "b *space c"]:
        """Raises: ValueError: the heads do not divide the channels."""
        channels = x.shape[-1]
        attend = attention.Attention(
            self.heads,
            attention.dim_of_head(channels, self.heads),
            bias=True,
            dtype=self.dtype,
            kernel_init=xavier_third,
            out_init=xavier,
            name="attn",
        )
        shift, scale, gate, shift_ff, scale_ff, gate_ff = steering(emb, 6, channels, self.dtype)
        h = x.reshape(x.shape[0], -1, channels)
        h = h + gate * attend(modulate(norm(self.dtype)(h), shift, scale))
        ff = FeedForward(self.ratio, self.dtype, name="ff")
        h = h + gate_ff * ff(modulate(norm(self.dtype)(h), shift_ff, scale_ff))
        return h.reshape(x.shape)


class Last(nn.Module):
    """A modulated norm and a linear layer that starts at zero; `FinalLayer` of facebookresearch/DiT."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b *space c"], emb: Float[Array, "b d"]
    ) -> Float[Array, "b *space k"]:
        channels = x.shape[-1]
        h = modulate(
            norm(self.dtype)(x.reshape(x.shape[0], -1, channels)),
            *steering(emb, 2, channels, self.dtype),
        )
        out = conv.dense(self.features, "linear", self.dtype, zero=True)(h)
        return out.reshape(*x.shape[:-1], self.features)
