"""The text encoder that a latent diffusion model trains along with its U-Net (Rombach et al. 2022,
section 3.3).

A plain transformer over token ids: token plus learned position embedding, then pre-norm layers

    x = x + attention(norm(x))          heads * head_dim need not equal the width
    x = x + feed_forward(norm(x))       width -> 4 width -> width, exact GELU, not gated

and a last norm. It sees the whole sentence (no causal mask). The reference is `TransformerWrapper`
around `Encoder` in `ldm/modules/x_transformer.py` of CompVis/latent-diffusion with the settings of
its `BERTEmbedder`; the head that predicts tokens is not built, since nothing reads it.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from ldm_jax.nn import attention, conv, embeddings, once


class Layer(nn.Module):
    """Attention among the tokens, without biases on q, k and v, and a feed-forward.

    Both start as zero, unlike the reference: next to embeddings of 0.02, branches of their usual scale would make all
    tokens of a prompt alike, and it takes thousands of steps to tell them apart again. An optimizer whose steps do not
    depend on the scale of the gradients (Muon) lets the branches grow to that scale within a few steps, so give the
    embeddings a scale of 1 with it.
    """

    heads: int
    head_dim: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None = None
    ) -> Float[Array, "b n d"]:
        width = x.shape[-1]
        attend = attention.Attention(
            self.heads, self.head_dim, zero=True, dtype=self.dtype, name="attn"
        )
        h = nn.LayerNorm(epsilon=attention.LAYER_NORM_EPS, dtype=self.dtype, name="norm_attn")(x)
        x = x + attend(h, mask=mask)
        h = nn.LayerNorm(epsilon=attention.LAYER_NORM_EPS, dtype=self.dtype, name="norm_ff")(x)
        h = conv.dense(4 * width, "ff_in", self.dtype)(h)
        h = nn.gelu(h, approximate=False)
        return x + conv.dense(width, "ff_out", self.dtype, zero=True)(h)


class TextTransformer(nn.Module):
    """Token ids to one vector a token; `BERTEmbedder` of CompVis/latent-diffusion."""

    vocab: int
    width: int
    layers: int
    length: int = 77  # the most tokens that it can read
    heads: int = 8
    head_dim: int = 64
    embedding_std: float = 0.02  # of token and position embeddings at the start
    position_period: float | None = None  # positions start as sinusoids; None: random
    dtype: Any = jnp.float32
    remat: bool | str = False  # recompute each layer in the backward pass; or a name of `once.KEEP`

    @nn.compact
    def __call__(
        self, ids: Int[Array, "b n"], mask: Bool[Array, "b n"] | None = None
    ) -> Float[Array, "b n d"]:
        """Ids in [0, vocab) -> embeddings; a token whose mask is False is not attended to.

        Raises:
          ValueError: more tokens than positions.
        """
        n = ids.shape[1]
        if n > self.length:
            raise ValueError(
                f"the text encoder has {self.length} positions and got {n} tokens; "
                f"truncate the tokens or set length={n}"
            )
        normal = nn.initializers.normal(self.embedding_std)
        embed = nn.Embed(
            self.vocab, self.width, embedding_init=normal, dtype=self.dtype, name="token"
        )
        position = self.param("position", self._positions, (self.length, self.width))
        x = embed(ids) + position[:n].astype(self.dtype)
        layer = once.once(Layer, self.remat)
        for i in range(self.layers):
            x = layer(self.heads, self.head_dim, self.dtype, name=f"layer_{i}")(x, mask)
        return nn.LayerNorm(epsilon=attention.LAYER_NORM_EPS, dtype=self.dtype, name="norm")(x)

    def _positions(self, key: jax.Array, shape: tuple[int, int]) -> Float[Array, "n d"]:
        """The embeddings of positions at the start: random, or sinusoids of periods 2 pi to 2 pi `position_period`.

        With sinusoids "the token before this one" is a rotation of a token's embedding, the same everywhere.
        """
        if self.position_period is None:
            return nn.initializers.normal(self.embedding_std)(key, shape)
        waves = embeddings.places(shape[:1], shape[1], self.position_period)
        return jnp.asarray(math.sqrt(2) * self.embedding_std * waves, jnp.float32)
