"""Token ids through CLIP's text encoders: what Stable Diffusion is conditioned on."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from ldm_jax.conditioners.drops import Drop, read, replace_dropped
from ldm_jax.models import clip
from ldm_jax.nn import embeddings
from ldm_jax.types import Batch, Cond


def state_names(field: str) -> tuple[str, str]:
    """The fields for what an encoder makes of the prompts in a field: states [b n d] and pooled [b d]."""
    return f"{field}_states", f"{field}_pooled"


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
    """Rows of ids, chunk by chunk, with the weights that the batch may have; pooled is what the first chunk gives.

    Where the batch has the states of its rows already (`encoded`), the empty prompt alone is encoded, for dropped rows.
    """
    ids: Int[Array, "b n"] = read(module, batch, field)
    length = len(null)
    if length > encoder.length or not length or ids.shape[1] % length:
        raise ValueError(
            f"the field {field!r} has rows of {ids.shape[1]} ids, the empty prompt {length}, the encoder "
            f"{encoder.length} positions; give the empty prompt's whole row, and rows of one or more times its length"
        )
    chunks = ids.shape[1] // length
    empty = jnp.tile(jnp.asarray(null, ids.dtype), chunks)

    def encode(ids):
        tokens, pooled = encoder(ids.reshape(-1, length), skip=skip, norm=norm)
        first = pooled.reshape(-1, chunks, pooled.shape[-1])[:, 0]
        return clip.TextOutput(tokens.reshape(*ids.shape, -1), first)

    states = state_names(field)
    if states[0] in batch:
        output = clip.TextOutput(*(batch[name].astype(encoder.dtype) for name in states))
        if drop is not None and field in drop:
            pairs = zip(output, encode(empty[None]), strict=True)
            output = clip.TextOutput(*(replace_dropped(y, drop, field, y0) for y, y0 in pairs))
    else:
        output = encode(replace_dropped(ids, drop, field, empty))
    if f"{field}_weights" in batch:
        weights: Float[Array, "b n"] = batch[f"{field}_weights"]
        if weights.shape != ids.shape:
            raise ValueError(
                f"the field '{field}_weights' has the shape {weights.shape}, {field!r} {ids.shape}; "
                "give one weight a token"
            )
        weights = replace_dropped(weights, drop, field, 1)
        rows = output.tokens.reshape(-1, length, output.tokens.shape[-1])
        weighed = clip.weigh(rows, weights.reshape(-1, length))
        output = output._replace(tokens=weighed.reshape(output.tokens.shape))
    return output


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
    vector: str | None = None  # a field [b d] beside the text, a dropped row of which is zeros

    @property
    def fields(self) -> tuple[str, ...]:
        return (self.field,) if self.vector is None else (self.field, self.vector)

    def encoded(self, batch: Batch) -> dict[str, Array]:
        """What the encoder makes of the prompts, by `state_names`: a batch that has it need not be encoded again."""
        given = (self.field, self.null, self.skip, self.norm)
        output = _encode_prompts(self, self.encoder, batch, None, *given)
        return dict(zip(state_names(self.field), output, strict=True))

    @nn.compact
    def __call__(self, batch: Batch, drop: Drop | None = None) -> Cond:
        output = _encode_prompts(
            self, self.encoder, batch, drop, self.field, self.null, self.skip, self.norm
        )
        if self.vector is None:
            return Cond(tokens=output.tokens)
        vector: Float[Array, "b d"] = read(self, batch, self.vector)
        return Cond(tokens=output.tokens, vector=replace_dropped(vector, drop, self.vector, 0))


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

    def encoded(self, batch: Batch) -> dict[str, Array]:
        """What the encoders make of the prompts, as `Clip.encoded`."""
        found = {}
        for field, encoder, null in zip(self.fields, self.encoders, self.null, strict=False):
            given = (field, null, self.skip, self.norm)
            output = _encode_prompts(self, encoder, batch, None, *given)
            found |= zip(state_names(field), output, strict=True)
        return found

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
