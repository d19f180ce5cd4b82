"""The VQ autoencoder: latents whose every position is one of finitely many codes (Rombach et al. 2022, section 3.1).

    x [b *space c]  ->  z [b *space/factor embed]  ->  e_k, k = argmin_j ‖z - e_j‖  ->  x̂ [b *space c]

Encoder and decoder are those of the KL autoencoder. The diffusion model works on z before quantisation, which becomes
the first layer of the decoder (same section), so that a sample need not be in the codebook. The argmin has no gradient;
that of the decoder goes to z as if quantisation were the identity (van den Oord et al. 2017, section 3.2).

Finite scalar quantisation (Mentzer et al. 2023) needs no codebook: each channel is bounded and rounded to one of
`levels`, and the codes are all combinations. Nothing is learnt, so nothing can die.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int

from ldm_jax.models.autoencoder import check_data, check_settings, halves
from ldm_jax.nn import conv

SHRINK = 1e-3  # of the range of finite scalars, so that the outermost levels are reached


class Codes(struct.PyTreeNode):
    """What quantisation made of a batch."""

    indices: Any  # int32 [b *space]
    latents: Any  # float32 [b *space embed]: before it ...
    entries: Any  # ... and after it, with the gradient passed through


def nearest(z: Float[Array, "b *space d"], codebook: Float[Array, "k d"]) -> Int[Array, "b *space"]:
    """The entry next to each position; the first of several that are equally near.

    In float32, and as a sum of squared differences: ‖z‖² + ‖e‖² - 2 z·e needs fewer operations but cancels where an
    entry is near, and accelerators round its product. One channel at a time, the distances of all pairs are never
    stored: the sum is part of the loop that looks for the least.
    """
    z, codebook = lax.stop_gradient((z.astype(jnp.float32), codebook.astype(jnp.float32)))
    channels = zip(jnp.moveaxis(z, -1, 0), codebook.T, strict=True)
    distance = sum(jnp.square(of_z[..., None] - of_code) for of_z, of_code in channels)
    return jnp.argmin(distance, axis=-1).astype(jnp.int32)


def codebook_loss(
    z: Float[Array, "b *space d"],
    entries: Float[Array, "b *space d"],
    beta: float = 0.25,
    legacy: bool = True,
) -> Float[Array, ""]:
    """mean (sg[z] - e)² + beta mean (z - sg[e])²: what draws entries and latents towards each other.

    That is van den Oord et al. (2017, eq. 3): beta weighs the commitment, the term that moves the latents. With
    `legacy` it weighs the other one, as in taming-transformers' `VectorQuantizer2` unless told otherwise, with which
    the published models were trained.
    """
    of_latents, of_entries = (1.0, beta) if legacy else (beta, 1.0)
    commitment = jnp.mean(jnp.square(lax.stop_gradient(entries) - z))
    learning = jnp.mean(jnp.square(entries - lax.stop_gradient(z)))
    return of_latents * commitment + of_entries * learning


def finite(
    z: Float[Array, "b *space d"], levels: Sequence[int]
) -> tuple[Float[Array, "b *space d"], Int[Array, "b *space"]]:
    """Finite scalar quantisation (Mentzer et al. 2023, appendix A.1): channel i becomes one of `levels[i]` in [-1, 1].

    The channel is bounded by a tanh to a range of as many whole numbers, rounded with the gradient passed through, and
    divided by half the range; the code counts them, the first channel fastest. An even number of levels is not
    symmetric around 0: -1 is a level and 1 is not.
    """
    count = np.asarray(levels)
    half, width = (count - 1) * (1 - SHRINK) / 2, count // 2
    offset = np.where(count % 2, 0.0, 0.5)
    bounded = jnp.tanh(z.astype(jnp.float32) + np.tan(offset / half)) * half - offset
    whole = lax.stop_gradient(jnp.round(bounded))
    digits = whole.astype(jnp.int32) + width
    indices = jnp.sum(digits * np.cumprod([1, *levels[:-1]]), axis=-1)
    return (whole + (bounded - lax.stop_gradient(bounded))) / width, indices.astype(jnp.int32)


class VQAutoencoder(nn.Module):
    """`VQModel` of CompVis/latent-diffusion; the defaults are its f = 4 model.

    Raises:
      ValueError: `attention` with another length than `mults`, `groups` that do not divide, or `levels` that do not fit
        `embed` and `codes`.
    """

    width: int = 128
    mults: Sequence[int] = (1, 2, 4)  # width of each level, in units of `width`; finest first
    blocks: int = 2  # residual blocks a level of the encoder; the decoder has one more
    z_channels: int = 3  # channels between encoder and decoder ...
    embed: int = 3  # ... and of the latents, mapped by one matrix each way
    codes: int = 8192  # entries of the codebook
    levels: Sequence[int] = ()  # of each channel of the latents; empty: there is a codebook
    attention: Sequence[bool] = ()  # for each level: attention after its blocks; empty: nowhere
    middle_attention: bool = True
    channels: int = 3  # of the data
    groups: int = 32
    stride: conv.PerAxis = 2  # between levels; (1, 2, 2) keeps the frames of a video
    dropout: float = 0.0
    dtype: Any = jnp.float32
    remat: bool | str = False  # recompute each block in the backward pass; or a name of `once.KEEP`

    def __post_init__(self):
        super().__post_init__()
        check_settings(self)
        if not self.levels:
            return
        if len(self.levels) != self.embed or min(self.levels) < 2:
            raise ValueError(
                f"levels={tuple(self.levels)} must be a number of at least 2 for each of embed={self.embed} channels"
            )
        if math.prod(self.levels) != self.codes:
            raise ValueError(
                f"levels={tuple(self.levels)} make {math.prod(self.levels)} codes, not codes={self.codes}; "
                "give that number, or leave levels out for a codebook"
            )

    @property
    def factor(self) -> int | tuple[int, ...]:
        """Positions of the data for one of the latents, along each axis."""
        return conv.total_stride(self.stride, len(self.mults))

    def setup(self):
        self.encoder, self.decoder = halves(self, self.z_channels)
        self.quant_conv = conv.Conv(self.embed, 1, dtype=self.dtype)
        self.post_quant_conv = conv.Conv(self.z_channels, 1, dtype=self.dtype)

        def uniform(key, shape):
            return jax.random.uniform(key, shape, minval=-1 / self.codes, maxval=1 / self.codes)

        if not self.levels:
            self.codebook = self.param("codebook", uniform, (self.codes, self.embed))

    def encode(
        self, x: Float[Array, "b *space c"], train: bool = False
    ) -> Float[Array, "b *out embed"]:
        """Data in [-1, 1] -> latents before quantisation, in float32.

        Raises:
          ValueError: the spatial shape is not divisible by `factor`, or the channels do not fit.
        """
        check_data(self, x)
        return self.quant_conv(self.encoder(x, train)).astype(jnp.float32)

    def latents(
        self, x: Float[Array, "b *space c"], rng: Array, train: bool = False
    ) -> Float[Array, "b *out embed"]:
        """What a diffusion model sees of the data: `encode`, which needs no rng."""
        return self.encode(x, train)

    def lookup(self, indices: Int[Array, "b *space"]) -> Float[Array, "b *space embed"]:
        """The entries of these codes, in float32; NaN where there is none of that number."""
        if self.levels:
            count, places = np.asarray(self.levels), np.cumprod([1, *self.levels[:-1]])
            digits = indices[..., None] // places % count
            entries = (digits - count // 2) / (count // 2)
            known = (indices >= 0) & (indices < self.codes)
            return jnp.where(known[..., None], entries, jnp.nan)
        return jnp.take(self.codebook, indices, axis=0, mode="fill", fill_value=jnp.nan)

    def quantize(
        self, z: Float[Array, "b *space embed"]
    ) -> tuple[Float[Array, "b *space embed"], Int[Array, "b *space"]]:
        """The nearest entries and their numbers; the gradient of the entries goes to z."""
        if self.levels:
            return finite(z, self.levels)
        indices = nearest(z, self.codebook)
        entries = lax.stop_gradient(self.lookup(indices))
        return entries + (z - lax.stop_gradient(z)), indices

    def decode(
        self, z: Float[Array, "b *space embed"], train: bool = False, quantized: bool = False
    ) -> Float[Array, "b *out c"]:
        """Latents -> data in about [-1, 1], in float32; they are quantised first unless they are `quantized`."""
        if not quantized:
            z, _ = self.quantize(z)
        return self.decoder(self.post_quant_conv(z), train).astype(jnp.float32)

    def __call__(
        self, x: Float[Array, "b *space c"], rng: Array | None = None, train: bool = False
    ) -> tuple[Float[Array, "b *space c"], Codes]:
        """The reconstruction, and the codes that it was made of; raises as `encode`. Nothing is drawn from `rng`."""
        z = self.encode(x, train)
        entries, indices = self.quantize(z)
        return self.decode(entries, train, quantized=True), Codes(indices, z, entries)
