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

from ldm_jax.models import clip, text
from ldm_jax.nn import conv, embeddings
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


def _encode_prompts(
    module: nn.Module,
    encoder: clip.TextEncoder,
    batch: Batch,
    drop: Drop | None,
    field: str,
    null: Sequence[int],
    skip: int,
    norm: bool,
) -> clip.TextOutput:
    """Rows of ids, chunk by chunk, with the weights that the batch may have; pooled is what the first chunk gives."""
    ids: Int[Array, "b n"] = read(module, batch, field)
    length = len(null)
    if length > encoder.length or not length or ids.shape[1] % length:
        raise ValueError(
            f"the field {field!r} has rows of {ids.shape[1]} ids, the empty prompt {length}, the encoder "
            f"{encoder.length} positions; give the empty prompt's whole row, and rows of one or more times its length"
        )
    chunks = ids.shape[1] // length
    ids = replace_dropped(ids, drop, field, jnp.tile(jnp.asarray(null, ids.dtype), chunks))
    tokens, pooled = encoder(ids.reshape(-1, length), skip=skip, norm=norm)
    if f"{field}_weights" in batch:
        weights: Float[Array, "b n"] = batch[f"{field}_weights"]
        if weights.shape != ids.shape:
            raise ValueError(
                f"the field '{field}_weights' has the shape {weights.shape}, {field!r} {ids.shape}; "
                "give one weight a token"
            )
        weights = replace_dropped(weights, drop, field, 1)
        tokens = clip.weigh(tokens, weights.reshape(-1, length))
    return clip.TextOutput(
        tokens.reshape(*ids.shape, -1), pooled.reshape(-1, chunks, pooled.shape[-1])[:, 0]
    )


class Clip(nn.Module):
    """Token ids through CLIP's text encoder: the condition of Stable Diffusion 1 and 2.

    Stable Diffusion 1 reads the last states (`skip=0`), 2 the last but one, of which its published encoder has 23 of 24
    layers: `skip=0` again. A dropped row is the empty prompt. A row may be several times as long as the empty prompt's:
    each such chunk is encoded by itself, and the states come one after the other. Where the batch has the field
    "<field>_weights" [b n], the tokens are weighted by it (`models.clip.weigh`, chunk by chunk).
    """

    encoder: nn.Module  # a models.clip.TextEncoder
    null: Sequence[int]  # ids of the empty prompt, the whole row with its padding
    skip: int = 0  # so many last layers are left out
    norm: bool = True  # with the final norm behind the states
    field: str = "tokens"

    @property
    def fields(self) -> tuple[str, ...]:
        return (self.field,)

    @nn.compact
    def __call__(self, batch: Batch, drop: Drop | None = None) -> Cond:
        output = _encode_prompts(
            self, self.encoder, batch, drop, self.field, self.null, self.skip, self.norm
        )
        return Cond(tokens=output.tokens)


class ClipPair(nn.Module):
    """Two of CLIP's text encoders and the sizes of the image: the condition of Stable Diffusion XL.

    Tokens are the encoders' last states but one, without a norm, joined along their features. The vector is the last
    encoder's pooled text and each of the k `sizes` as a sinusoid of width 256. These are, in pixels: the image's height
    and width before it was resized, the top and left of the crop, then height and width of the target (k = 6, base), or
    the aesthetic score (k = 5, refiner). The refiner has the second encoder alone, and reads its field alone. This is
    what diffusers' `UNet2DConditionModel` feeds to `add_embedding` (addition_embed_type "text_time").

    A dropped text is the empty prompt or, with `zero_null`, zeros in place of all that its encoder gives, as the base
    model has it. Dropped sizes become those of `null_sizes`, a None among which keeps the number. By default they all
    stay, as in the published sampling; the refiner's are (None, None, None, None, 2.5). Chunks and weights are those of
    `Clip`; the pooled text is that of the first chunk.
    """

    encoders: Sequence[nn.Module]  # one or two models.clip.TextEncoder
    null: Sequence[Sequence[int]]  # for each, ids of the empty prompt with its padding
    zero_null: bool = False
    null_sizes: Sequence[float | None] = ()
    skip: int = 1
    norm: bool = False
    width: int = 256  # of the sinusoid of a size
    texts: Sequence[str] = ("tokens", "tokens_2")  # the last ones are read
    sizes: str = "sizes"

    @property
    def fields(self) -> tuple[str, ...]:
        return (*self.texts[len(self.texts) - len(self.encoders) :], self.sizes)

    @nn.compact
    def __call__(self, batch: Batch, drop: Drop | None = None) -> Cond:
        if not 1 <= len(self.encoders) == len(self.null) <= len(self.texts):
            raise ValueError(
                f"ClipPair has {len(self.encoders)} encoders, {len(self.null)} empty prompts and the fields "
                f"{tuple(self.texts)}; give an empty prompt and a field for each encoder"
            )
        outputs = []
        for field, encoder, null in zip(self.fields, self.encoders, self.null, strict=False):
            output = _encode_prompts(self, encoder, batch, drop, field, null, self.skip, self.norm)
            if self.zero_null:
                output = clip.TextOutput(*(replace_dropped(y, drop, field, 0) for y in output))
            outputs.append(output)
        shapes = [output.tokens.shape for output in outputs]
        if len({shape[:2] for shape in shapes}) > 1:
            raise ValueError(
                f"the encoders' states of shapes {shapes} cannot be joined along their features; "
                "give both texts the same number of chunks"
            )
        sizes: Float[Array, "b k"] = read(self, batch, self.sizes).astype(jnp.float32)
        if self.null_sizes:
            if len(self.null_sizes) != sizes.shape[-1]:
                raise ValueError(
                    f"null_sizes={tuple(self.null_sizes)} for {sizes.shape[-1]} sizes; give a number or None for each"
                )
            null = [x if y is None else y for x, y in zip(sizes.T, self.null_sizes, strict=True)]
            null = jnp.stack([jnp.broadcast_to(x, sizes.shape[:1]) for x in null], axis=1)
            sizes = replace_dropped(sizes, drop, self.sizes, null)
        pooled = outputs[-1].pooled
        waves = embeddings.sinusoid(sizes.reshape(-1), self.width).reshape(sizes.shape[0], -1)
        return Cond(
            vector=jnp.concatenate([pooled, waves.astype(pooled.dtype)], axis=-1),
            tokens=jnp.concatenate([output.tokens for output in outputs], axis=-1),
        )


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
