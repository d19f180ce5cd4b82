"""Token ids through a text transformer that is trained along."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Int

from ldm_jax.conditioners.drops import Drop, read, replace_dropped
from ldm_jax.models import text
from ldm_jax.types import Batch, Cond


class Text(nn.Module):
    """Token ids through a text transformer that is trained along.

    A dropped row is the empty prompt. With mask_padding, padding is neither attended to inside the
    transformer nor by the network. The first token is always read, so that no row is empty.
    """

    vocab: int
    width: int
    layers: int
    length: int = 77
    heads: int = 8
    head_dim: int = 64
    embedding_std: float = 0.02
    position_period: float | None = None
    null: Sequence[int] = ()  # ids of the empty prompt, without its padding
    pad: int = 0
    mask_padding: bool = False
    pool: bool = (
        False  # the mean of the tokens becomes a vector too, which small models learn from sooner
    )
    field: str = "tokens"
    dtype: Any = jnp.float32
    remat: bool | str = False

    @property
    def fields(self) -> tuple[str, ...]:
        return (self.field,)

    @nn.compact
    def __call__(self, batch: Batch, drop: Drop | None = None) -> Cond:
        ids: Int[Array, "b n"] = read(self, batch, self.field)
        n = ids.shape[1]
        if len(self.null) > n:
            raise ValueError(
                f"the empty prompt has {len(self.null)} tokens, the field {self.field!r} {n}"
            )
        null = jnp.array([*self.null, *[self.pad] * (n - len(self.null))], ids.dtype)
        ids = replace_dropped(ids, drop, self.field, null)
        mask = None
        if self.mask_padding:
            mask = (ids != self.pad) | (jnp.arange(n) == 0)
        encoder = text.TextTransformer(
            vocab=self.vocab,
            width=self.width,
            layers=self.layers,
            length=self.length,
            heads=self.heads,
            head_dim=self.head_dim,
            embedding_std=self.embedding_std,
            position_period=self.position_period,
            dtype=self.dtype,
            remat=self.remat,
            name="encoder",
        )
        tokens = encoder(ids, mask)
        if not self.pool:
            return Cond(tokens=tokens, mask=mask)
        counted = jnp.ones(ids.shape, tokens.dtype) if mask is None else mask.astype(tokens.dtype)
        pooled = jnp.einsum("bnd,bn->bd", tokens, counted) / counted.sum(1, keepdims=True)
        return Cond(vector=pooled, tokens=tokens, mask=mask)
