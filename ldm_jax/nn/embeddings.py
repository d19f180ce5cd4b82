"""How a time, a position, a vector and a class enter a network: as sinusoids, through an MLP, as rows of a table."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
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


def places(
    space: Sequence[int], width: int, max_period: float = 10_000.0
) -> Float[np.ndarray, "*space width"]:
    """Fixed embeddings of positions: [sin(p w_i), cos(p w_i)] for the index p along each axis, the last axis first.

    w_i = max_period^(-i / n) for i < n, where n = width / (2 axes), rounded down; what is left of the width is zeros.
    On two axes that is `get_2d_sincos_pos_embed` of He et al. 2022 (MAE) and Peebles & Xie 2023 (DiT).

    Raises:
      ValueError: a width of less than two an axis.
    """
    n = width // (2 * len(space))
    if not n:
        raise ValueError(
            f"a width of {width} is too small for positions along {len(space)} axes; give at least {2 * len(space)}"
        )
    w = max_period ** (-np.arange(n) / n)
    found = np.zeros((*space, width), np.float32)
    for i, axis in enumerate(reversed(range(len(space)))):
        index = np.arange(space[axis]).reshape(-1, *(1,) * (len(space) - axis))
        found[..., 2 * n * i : 2 * n * i + n] = np.sin(index * w)
        found[..., 2 * n * i + n : 2 * n * (i + 1)] = np.cos(index * w)
    return found


class MLP(nn.Module):
    """Linear, SiLU, linear."""

    width: int
    dtype: Any = jnp.float32
    kernel_init: conv.Init = conv.fan_in_uniform  # of both layers

    @nn.compact
    def __call__(self, x: Float[Array, "b d"]) -> Float[Array, "b k"]:
        h = conv.dense(self.width, "in", self.dtype, init=self.kernel_init)(x)
        return conv.dense(self.width, "out", self.dtype, init=self.kernel_init)(nn.silu(h))


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
