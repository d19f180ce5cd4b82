"""Conditions that are fields of the batch, almost as they are: classes, vectors, maps."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from ldm_jax.conditioners.drops import Drop, read, replace_dropped
from ldm_jax.nn import conv
from ldm_jax.types import Batch, Cond


def check_into(into: str) -> None:
    if into not in ("tokens", "vector"):
        raise ValueError(f"into={into!r} is unknown; choose 'tokens' or 'vector'")


class Label(nn.Module):
    """A class number to a learned vector, `ClassEmbedder` of CompVis.

    A dropped row is the class after the last: the table has `classes + 1` rows.
    """

    classes: int
    width: int
    into: str = "tokens"  # one token for cross-attention, or "vector"
    field: str = "label"
    dtype: Any = jnp.float32
    embedding_std: float = 1.0  # with which the table starts

    @property
    def fields(self) -> tuple[str, ...]:
        return (self.field,)

    @nn.compact
    def __call__(self, batch: Batch, drop: Drop | None = None) -> Cond:
        check_into(self.into)
        label: Int[Array, " b"] = read(self, batch, self.field)
        label = label.astype(jnp.promote_types(label.dtype, jnp.int32))  # bytes end at 255
        label = replace_dropped(label, drop, self.field, self.classes)
        embed = nn.Embed(
            self.classes + 1,
            self.width,
            embedding_init=nn.initializers.normal(self.embedding_std),
            dtype=self.dtype,
            name="embedding",
        )
        vector = embed(label)
        return Cond(tokens=vector[:, None]) if self.into == "tokens" else Cond(vector=vector)


class Vector(nn.Module):
    """A field of numbers [b d] as it is, or projected to `width`.

    A dropped row is zeros before the projection, hence the projection's bias after it.
    """

    field: str
    width: int | None = None  # None: no projection
    dtype: Any = jnp.float32
    into: str = "vector"  # or "tokens": one token for cross-attention

    @property
    def fields(self) -> tuple[str, ...]:
        return (self.field,)

    @nn.compact
    def __call__(self, batch: Batch, drop: Drop | None = None) -> Cond:
        check_into(self.into)
        vector: Float[Array, "b d"] = read(self, batch, self.field)
        vector = replace_dropped(vector.astype(self.dtype), drop, self.field, 0)
        if self.width is not None:
            vector = conv.dense(self.width, "project", self.dtype)(vector)
        return Cond(tokens=vector[:, None]) if self.into == "tokens" else Cond(vector=vector)


class Tokens(nn.Module):
    """A field [b count width] for cross-attention: embeddings of neighbours. A dropped row is zeros.

    They are multiplied by `scale`: with the square root of the width embeddings of length 1 have values of about 1, as
    learned ones have. With `pool` their mean is the vector.

    Raises:
      ValueError: a field of another shape.
    """

    field: str
    count: int
    width: int
    dtype: Any = jnp.float32
    scale: float = 1.0
    pool: bool = False

    @property
    def fields(self) -> tuple[str, ...]:
        return (self.field,)

    @nn.compact
    def __call__(self, batch: Batch, drop: Drop | None = None) -> Cond:
        tokens: Float[Array, "b n d"] = read(self, batch, self.field)
        if tokens.shape[1:] != (self.count, self.width):
            raise ValueError(
                f"the field {self.field!r} has {tokens.shape[1]} tokens of width {tokens.shape[2]} and the conditioner "
                f"reads {self.count} of {self.width}; make them equal"
            )
        tokens = self.scale * replace_dropped(tokens.astype(self.dtype), drop, self.field, 0)
        return Cond(tokens=tokens, vector=tokens.mean(1) if self.pool else None)


class Spatial(nn.Module):
    """A field [b *space c] brought to the grid of the latents, `SpatialRescaler` of CompVis.

    A dropped row is zeros. Means over blocks of `factor` positions along each axis (for powers of
    two the same as halving bilinearly, again and again), then a 1x1 convolution without bias to
    `channels`. A map of class numbers [b *space 1] becomes `classes` channels of 0 and 1 first, all 0
    where the number is -1: a position of no class.
    """

    field: str
    channels: int | None = None  # None: as they are, no convolution
    factor: int = 1
    classes: int | None = None  # of an integer field
    nearest: bool = False  # the first position of each block, in place of the mean
    signed: bool = False  # 2x - 1 at the end: for masks of 0 and 1
    dtype: Any = jnp.float32

    @property
    def fields(self) -> tuple[str, ...]:
        return (self.field,)

    @nn.compact
    def __call__(self, batch: Batch, drop: Drop | None = None) -> Cond:
        x = read(self, batch, self.field)
        integers = jnp.issubdtype(x.dtype, jnp.integer)
        if integers != (self.classes is not None) or (integers and x.shape[-1] != 1):
            raise ValueError(
                f"the field {self.field!r} is {x.dtype}{list(x.shape)} and classes={self.classes}; "
                "give `classes` for a map of class numbers [b *space 1], and only for one"
            )
        if any(size % self.factor for size in x.shape[1:-1]):
            raise ValueError(
                f"factor={self.factor} does not divide the grid {x.shape[1:-1]} of {self.field!r}"
            )
        x = jax.nn.one_hot(x[..., 0], self.classes, dtype=self.dtype) if integers else x
        x = x.astype(self.dtype)
        if self.factor > 1 and self.nearest:
            x = x[:, *(slice(None, None, self.factor),) * (x.ndim - 2)]
        elif self.factor > 1:
            block = (self.factor,) * (x.ndim - 2)
            x = nn.avg_pool(x, block, block)
        x = replace_dropped(2 * x - 1 if self.signed else x, drop, self.field, 0)
        if self.channels is not None:
            x = conv.dense(self.channels, "project", self.dtype, bias=False)(x)
        return Cond(spatial=x)
