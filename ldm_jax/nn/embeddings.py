"""How a scalar time, a vector and a class enter a network: as sinusoids, through an MLP, as rows of a table."""

import math
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from ldm_jax.nn import conv


def sinusoid(
    t: Float[Array, " b"], width: int, max_period: float = 10_000.0
) -> Float[Array, "b width"]:
    """[cos(t w_i), sin(t w_i)], w_i = max_period^(-2i / width); CompVis, after Vaswani et al. 2017.

    t is any float; the periods run from 2 pi to 2 pi max_period.

    Raises:
      ValueError: an odd width.
    """
    if width % 2:
        raise ValueError(f"a sinusoidal embedding needs an even width and got {width}")
    i = jnp.arange(width // 2, dtype=jnp.float32)
    angle = t.astype(jnp.float32)[:, None] * jnp.exp(-math.log(max_period) * 2 * i / width)
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


class MLP(nn.Module):
    """Linear, SiLU, linear."""

    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b d"]) -> Float[Array, "b k"]:
        h = conv.dense(self.width, "in", self.dtype)(x)
        return conv.dense(self.width, "out", self.dtype)(nn.silu(h))


class Table(nn.Module):
    """Rows of a table, of which x is the mixture: a one-hot x picks a row, zeros give none."""

    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b rows"]) -> Float[Array, "b k"]:
        # Drawn like torch's embeddings.
        init = nn.initializers.normal(1.0)
        rows = self.param("embedding", init, (x.shape[-1], self.width))
        return x.astype(self.dtype) @ rows.astype(self.dtype)
