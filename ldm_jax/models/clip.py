"""CLIP's two encoders (Radford et al. 2021), whose states condition Stable Diffusion and its kin.

Both are transformers of pre-norm layers, with biases on all projections:

    x = x + attention(norm(x)),  x = x + ff_out(f(ff_in(norm(x))))

where f is x sigmoid(1.702 x) in OpenAI's models (Stable Diffusion 1, first encoder of XL) and the exact GELU in
OpenCLIP's (Stable Diffusion 2, second encoder of XL). The text encoder looks backwards only, so the state at the end
of the text has seen all of it: that one is pooled. The vision encoder pools an extra first token. The references are
`CLIPTextModelWithProjection` and `CLIPVisionModelWithProjection` of transformers.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from ldm_jax.nn import attention, conv, once

Activation = Literal["quick_gelu", "gelu"]

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of images in [0, 1]; CLIP's repository
STD = (0.26862954, 0.26130258, 0.27577711)


class TextOutput(NamedTuple):
    """What a text encoder knows of its texts."""

    tokens: Float[Array, "b n d"]
    pooled: Float[Array, "b p"]


class VisionOutput(NamedTuple):
    """What a vision encoder knows of its images; the class token is the first of the tokens."""

    tokens: Float[Array, "b n d"]
    pooled: Float[Array, "b p"]


def quick_gelu(x: Array) -> Array:
    return x * nn.sigmoid(1.702 * x)


class Layer(nn.Module):
    """Attention and a feed-forward, each behind its norm."""

    heads: int
    hidden: int
    activation: Activation
    causal: bool
    eps: float = attention.LAYER_NORM_EPS
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        width = x.shape[-1]

        def norm(name):
            return nn.LayerNorm(epsilon=self.eps, dtype=self.dtype, name=name)

        attend = attention.Attention(
            self.heads,
            attention.dim_of_head(width, self.heads),
            bias=True,
            dtype=self.dtype,
            causal=self.causal,
            name="attn",
        )
        x = x + attend(norm("norm_attn")(x))
        h = conv.dense(self.hidden, "ff_in", self.dtype)(norm("norm_ff")(x))
        h = quick_gelu(h) if self.activation == "quick_gelu" else nn.gelu(h, approximate=False)
        return x + conv.dense(width, "ff_out", self.dtype)(h)


def _states(module: nn.Module, x: Array, causal: bool) -> list[Array]:
    """The layers of an encoder: what enters them, and what leaves each."""
    layer = once.once(Layer, module.remat)
    states = [x]
    for i in range(module.layers):
        made = layer(
            module.heads,
            module.hidden,
            module.activation,
            causal,
            module.eps,
            module.dtype,
            name=f"layer_{i}",
        )
        states.append(made(states[-1]))
    return states


def _check_skip(skip: int, layers: int) -> None:
    if not 0 <= skip <= layers:
        raise ValueError(f"skip={skip} layers cannot be left out of {layers}; give 0 to {layers}")


class TextEncoder(nn.Module):
    """Token ids to one state a token and one vector a text; `CLIPTextModel`, and with a projection its kin.

    The pooled state is that of the first `eos`. Without an `eos` it is that of the largest id in the row, which is the
    end of the text only as long as no token was added after it in the vocabulary: configs with the wrong eos_token_id
    of 2 (all of Stable Diffusion) mean this. Set `eos` when adding tokens.
    """

    vocab: int
    width: int
    layers: int
    heads: int
    hidden: int  # width inside the feed-forward
    activation: Activation = "quick_gelu"
    length: int = 77  # the most tokens that it can read
    projection: int | None = None  # width of the pooled vector; None: the state as it is
    eos: int | None = None
    eps: float = attention.LAYER_NORM_EPS
    dtype: Any = jnp.float32
    remat: bool | str = False  # recompute each layer in the backward pass; or a name of `once.KEEP`

    @nn.compact
    def __call__(self, ids: Int[Array, "b n"], skip: int = 0, norm: bool = True) -> TextOutput:
        """Ids in [0, vocab) -> states after leaving out the last `skip` layers, and the pooled last ones.

        The final norm is applied to the states if `norm`, and always before pooling. All parameters exist whatever
        `skip` and `norm` are.

        Raises:
          ValueError: more tokens than positions, or more layers to leave out than there are.
        """
        n = ids.shape[1]
        if n > self.length:
            raise ValueError(
                f"the text encoder has {self.length} positions and got {n} tokens; "
                f"truncate the texts, or encode them in chunks of {self.length}"
            )
        _check_skip(skip, self.layers)
        normal = nn.initializers.normal(0.02)
        embed = nn.Embed(
            self.vocab, self.width, embedding_init=normal, dtype=self.dtype, name="token"
        )
        position = self.param("position", normal, (self.length, self.width))
        states = _states(self, embed(ids) + position[:n].astype(self.dtype), causal=True)
        final = nn.LayerNorm(epsilon=self.eps, dtype=self.dtype, name="norm")
        last = final(states[-1])
        tokens = states[self.layers - skip]
        if norm:
            tokens = final(tokens) if skip else last
        end = jnp.argmax(ids if self.eos is None else ids == self.eos, axis=1)
        pooled = jnp.take_along_axis(last, end[:, None, None], axis=1)[:, 0]
        if self.projection is not None:
            pooled = conv.dense(self.projection, "projection", self.dtype, bias=False)(pooled)
        return TextOutput(tokens, pooled)


class VisionEncoder(nn.Module):
    """Images to one state a patch and one vector; `CLIPVisionModel`, and with a projection its kin."""

    size: int  # of the images, in pixels
    patch: int
    width: int
    layers: int
    heads: int
    hidden: int  # width inside the feed-forward
    activation: Activation = "quick_gelu"
    projection: int | None = None  # width of the pooled vector; None: the state as it is
    eps: float = attention.LAYER_NORM_EPS
    dtype: Any = jnp.float32
    remat: bool | str = False  # recompute each layer in the backward pass; or a name of `once.KEEP`

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], skip: int = 0) -> VisionOutput:
        """Images, normalised with CLIP's mean and deviation (`prepared`) -> states and the pooled class token.

        The states, without a final norm, are those after leaving out the last `skip` layers. Pooled is the class
        token of the last layer behind a norm, projected if there is a projection.

        Raises:
          ValueError: images of another size, or more layers to leave out than there are.
        """
        if x.shape[1:3] != (self.size, self.size):
            raise ValueError(
                f"the vision encoder reads images of {self.size}x{self.size} and got {x.shape[1]}x{x.shape[2]}; "
                "resize them (clip.prepared)"
            )
        _check_skip(skip, self.layers)
        patches = conv.Conv(
            self.width,
            self.patch,
            self.patch,
            ((0, 0), (0, 0)),
            dtype=self.dtype,
            bias=False,
            name="patch",
        )(x)
        normal = nn.initializers.normal(0.02)
        first = self.param("class", normal, (self.width,)).astype(self.dtype)
        h = patches.reshape(x.shape[0], -1, self.width)
        h = jnp.concatenate([jnp.broadcast_to(first, (x.shape[0], 1, self.width)), h], axis=1)
        h = h + self.param("position", normal, h.shape[1:]).astype(self.dtype)
        h = nn.LayerNorm(epsilon=self.eps, dtype=self.dtype, name="norm_in")(h)
        states = _states(self, h, causal=False)
        pooled = nn.LayerNorm(epsilon=self.eps, dtype=self.dtype, name="norm")(states[-1][:, 0])
        if self.projection is not None:
            pooled = conv.dense(self.projection, "projection", self.dtype, bias=False)(pooled)
        return VisionOutput(states[self.layers - skip], pooled)


def prepared(x: Float[Array, "b h w 3"], size: int = 224) -> Float[Array, "b size size 3"]:
    """Images in [-1, 1] as a vision encoder reads them: shorter side to `size`, the middle square, CLIP's norm.

    The cubic resize is antialiased, with the kernel of PIL but without its rounding to bytes after each axis: close to
    what `CLIPImageProcessor` gives (a few levels of 255), not equal.
    """
    shape = x.shape[1:3]
    height, width = (max(size, size * side // min(shape)) for side in shape)
    y = jax.image.resize(x, (x.shape[0], height, width, 3), "cubic", antialias=True)
    top, left = (height - size) // 2, (width - size) // 2
    y = jnp.clip(y[:, top : top + size, left : left + size], -1, 1) / 2 + 0.5
    return (y - jnp.array(MEAN, y.dtype)) / jnp.array(STD, y.dtype)


def weigh(tokens: Float[Array, "b n d"], weights: Float[Array, "b n"]) -> Float[Array, "b n d"]:
    """Every token times its weight, and all of a text by the factor that gives it its old mean back.

    The mean is over the tokens and features of one text, so that a text is the same in any batch; AUTOMATIC1111's web
    interface, whose convention this is, takes it over all texts that it encodes at a time (mostly one).
    """
    weighted = tokens * weights[..., None].astype(tokens.dtype)
    before, after = (x.astype(jnp.float32).mean((1, 2), keepdims=True) for x in (tokens, weighted))
    factor = jnp.where(after == 0, 1.0, before / jnp.where(after == 0, 1.0, after))
    return weighted * factor.astype(tokens.dtype)
