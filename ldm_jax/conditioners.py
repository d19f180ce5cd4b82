"""Conditioners turn named fields of a batch into what a network is conditioned on.

    conditioner(batch, drop) -> Cond

`drop` says for each field which rows lose it: `{field: Bool[b]}`, where a field without an entry is
kept. Training drops at random (`draw_drops`), and classifier-free guidance compares with all fields
dropped (`drop_all`): one definition of the null condition serves both (Ho & Salimans 2022). What a
dropped row becomes is the conditioner's choice: the empty prompt, the class beyond the last one,
zeros.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from ldm_jax.models import text
from ldm_jax.nn import conv
from ldm_jax.types import Batch, Cond

Drop = dict[str, Bool[Array, " b"]]


def draw_drops(
    rng: Array,
    fields: Sequence[str],
    rates: Mapping[str, float | int] | float | int,
    batch_size: int,
) -> Drop:
    """Which rows lose which field, independently: one rate for all or one each (none given: 0).

    Raises:
      ValueError: a rate for a field that is not among `fields`, or a rate outside [0, 1].
    """
    if not isinstance(rates, Mapping):
        rates = dict.fromkeys(fields, rates)
    unknown = sorted(set(rates) - set(fields))
    if unknown:
        raise ValueError(f"drop rates for {unknown}, but the conditioner reads {list(fields)}")
    wrong = {field: rate for field, rate in rates.items() if not 0 <= rate <= 1}
    if wrong:
        raise ValueError(f"the drop rates {wrong} are no probabilities; give numbers from 0 to 1")
    return {
        field: jax.random.bernoulli(
            jax.random.fold_in(rng, i), float(rates.get(field, 0)), (batch_size,)
        )
        for i, field in enumerate(fields)
    }


def drop_all(fields: Sequence[str], batch_size: int) -> Drop:
    """Every row loses every field: the null condition."""
    return {field: jnp.ones(batch_size, bool) for field in fields}


def read(module: nn.Module, batch: Batch, field: str) -> Array:
    if field not in batch:
        raise ValueError(
            f"the conditioner {type(module).__name__} reads the field {field!r}, "
            f"the batch has {sorted(batch)}"
        )
    return batch[field]


def replace_dropped(x: Array, drop: Drop | None, field: str, null: Array | int | float) -> Array:
    """`x` with `null` in the rows that lose `field`."""
    if drop is None or field not in drop:
        return x
    rows = drop[field]
    if rows.shape != x.shape[:1]:
        raise ValueError(
            f"drop[{field!r}] has the shape {rows.shape}, the batch has {x.shape[0]} rows"
        )
    return jnp.where(rows.reshape(-1, *(1,) * (x.ndim - 1)), jnp.asarray(null, x.dtype), x)


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
    null: Sequence[int] = ()  # ids of the empty prompt, without its padding
    pad: int = 0
    mask_padding: bool = False
    pool: bool = (
        False  # the mean of the tokens becomes a vector too, which small models learn from sooner
    )
    field: str = "tokens"
    dtype: Any = jnp.float32
    remat: bool = False

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


class Label(nn.Module):
    """A class number to a learned vector, `ClassEmbedder` of CompVis.

    A dropped row is the class after the last: the table has `classes + 1` rows.
    """

    classes: int
    width: int
    into: str = "tokens"  # one token for cross-attention, or "vector"
    field: str = "label"
    dtype: Any = jnp.float32

    @property
    def fields(self) -> tuple[str, ...]:
        return (self.field,)

    @nn.compact
    def __call__(self, batch: Batch, drop: Drop | None = None) -> Cond:
        if self.into not in ("tokens", "vector"):
            raise ValueError(f"into={self.into!r} is unknown; choose 'tokens' or 'vector'")
        label: Int[Array, " b"] = read(self, batch, self.field)
        label = label.astype(jnp.promote_types(label.dtype, jnp.int32))  # bytes end at 255
        label = replace_dropped(label, drop, self.field, self.classes)
        embed = nn.Embed(
            self.classes + 1,
            self.width,
            embedding_init=nn.initializers.normal(1.0),
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

    @property
    def fields(self) -> tuple[str, ...]:
        return (self.field,)

    @nn.compact
    def __call__(self, batch: Batch, drop: Drop | None = None) -> Cond:
        vector: Float[Array, "b d"] = read(self, batch, self.field)
        vector = replace_dropped(vector.astype(self.dtype), drop, self.field, 0)
        if self.width is not None:
            vector = conv.dense(self.width, "project", self.dtype)(vector)
        return Cond(vector=vector)


class Spatial(nn.Module):
    """A field [b *space c] brought to the grid of the latents, `SpatialRescaler` of CompVis.

    A dropped row is zeros. Means over blocks of `factor` positions along each axis (for powers of
    two the same as halving bilinearly, again and again), then a 1x1 convolution without bias to
    `channels`. A map of class numbers [b *space 1] becomes `classes` channels of 0 and 1 first.
    """

    field: str
    channels: int | None = None  # None: as they are, no convolution
    factor: int = 1
    classes: int | None = None  # of an integer field
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
        x = replace_dropped(x.astype(self.dtype), drop, self.field, 0)
        if self.factor > 1:
            block = (self.factor,) * (x.ndim - 2)
            x = nn.avg_pool(x, block, block)
        if self.channels is not None:
            x = conv.dense(self.channels, "project", self.dtype, bias=False)(x)
        return Cond(spatial=x)


class Combine(nn.Module):
    """Several conditioners as one.

    Vectors and spatial maps are joined along their channels, tokens one after the other. Parameters
    lie under parts_0, parts_1 ... in the order given.
    """

    parts: Sequence[nn.Module]

    @property
    def fields(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(field for part in self.parts for field in part.fields))

    @nn.compact
    def __call__(self, batch: Batch, drop: Drop | None = None) -> Cond:
        conds = [part(batch, drop) for part in self.parts]

        def join(name: str, axis: int) -> Array | None:
            arrays = [getattr(cond, name) for cond in conds if getattr(cond, name) is not None]
            shapes = [a.shape for a in arrays]
            others = {(*shape[:axis], *shape[len(shape) + axis + 1 :]) for shape in shapes}
            if len(others) > 1:
                raise ValueError(
                    f"the conditioners' {name} of shapes {shapes} cannot be joined along "
                    f"axis {axis}; make their other axes equal"
                )
            return jnp.concatenate(arrays, axis) if arrays else None

        # A part without a mask wants all its tokens to be read, as soon as another part masks some.
        if any(cond.mask is not None for cond in conds):
            conds = [
                cond.replace(mask=jnp.ones(cond.tokens.shape[:2], bool))
                if cond.tokens is not None and cond.mask is None
                else cond
                for cond in conds
            ]
        return Cond(
            vector=join("vector", -1),
            tokens=join("tokens", -2),
            mask=join("mask", -1),
            spatial=join("spatial", -1),
        )
