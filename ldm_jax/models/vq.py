"""The VQ autoencoder: latents whose every position is one entry of a codebook (Rombach et al. 2022, section 3.1).

    x [b *space c]  ->  z [b *space/factor embed]  ->  e_k, k = argmin_j ‖z - e_j‖  ->  x̂ [b *space c]

Encoder and decoder are those of the KL autoencoder. The diffusion model works on z before quantisation, which becomes
the first layer of the decoder (same section), so that a sample need not be in the codebook. The argmin has no gradient;
that of the decoder goes to z as if quantisation were the identity (van den Oord et al. 2017, section 3.2).
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int

from ldm_jax.models.autoencoder import check_data, check_settings, halves
from ldm_jax.nn import conv


class Codes(struct.PyTreeNode):
    """What quantisation did to a batch."""

    indices: Any  # int32 [b *space]
    loss: Any  # float32 [], see `codebook_loss`


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
    z: Float[Array, "b *space d"], entries: Float[Array, "b *space d"], beta: float = 0.25
) -> Float[Array, ""]:
    """mean (sg[e] - z)² + beta mean (e - sg[z])²: what draws latents and entries towards each other.

    Van den Oord et al. (2017, eq. 3) have beta on the other term, the one that moves the latents. Taming-transformers'
    `VectorQuantizer2`, with which the published models were trained, has it here unless `legacy=False`.
    """
    commitment = jnp.mean(jnp.square(lax.stop_gradient(entries) - z))
    return commitment + beta * jnp.mean(jnp.square(entries - lax.stop_gradient(z)))


class VQAutoencoder(nn.Module):
    """`VQModel` of CompVis/latent-diffusion; the defaults are its f = 4 model.

    Raises:
      ValueError: `attention` with another length than `mults`, or `groups` that do not divide.
    """

    width: int = 128
    mults: Sequence[int] = (1, 2, 4)  # width of each level, in units of `width`; finest first
    blocks: int = 2  # residual blocks a level of the encoder; the decoder has one more
    z_channels: int = 3  # channels between encoder and decoder ...
    embed: int = 3  # ... and of the latents, mapped by one matrix each way
    codes: int = 8192  # entries of the codebook
    attention: Sequence[bool] = ()  # for each level: attention after its blocks; empty: nowhere
    middle_attention: bool = True
    channels: int = 3  # of the data
    groups: int = 32
    stride: conv.PerAxis = 2  # between levels; (1, 2, 2) keeps the frames of a video
    dropout: float = 0.0
    dtype: Any = jnp.float32
    remat: bool | str = False  # recompute each block in the backward pass; or a name of `once.KEEP`
    beta: float = 0.25  # see `codebook_loss`

    def __post_init__(self):
        super().__post_init__()
        check_settings(self)

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
        """The entries of the codebook, in float32; NaN where there is none of that number."""
        return jnp.take(self.codebook, indices, axis=0, mode="fill", fill_value=jnp.nan)

    def quantize(
        self, z: Float[Array, "b *space embed"]
    ) -> tuple[Float[Array, "b *space embed"], Int[Array, "b *space"]]:
        """The nearest entries and their numbers; the gradient of the entries goes to z."""
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
        """The reconstruction, and the codes with their loss; raises as `encode`. Nothing is drawn from `rng`."""
        z = self.encode(x, train)
        entries, indices = self.quantize(z)
        loss = codebook_loss(z, self.lookup(indices), self.beta)
        return self.decode(entries, train, quantized=True), Codes(indices, loss)
