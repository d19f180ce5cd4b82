"""The tiny autoencoder: another network's latents in a few milliseconds (TAESD, github.com/madebyollin/taesd).

It was distilled from the autoencoder of Stable Diffusion (or of XL), and maps data to the same latents, already scaled
as the diffusion model wants them: its scale is 1. Both halves are convolutions with ReLU, without norms and attention:

    x [b *space c]  ->  z [b *space/8 4]  ->  x̂ [b *space c]

Inside, data lies in [0, 1]; `encode` and `decode` speak [-1, 1] as all autoencoders do, and do not clip.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from ldm_jax.models.autoencoder import check_data
from ldm_jax.nn import conv

LIMIT = 3.0  # latents are squashed to ±LIMIT before they are decoded
MAGNITUDE = 3.0  # latents in ±MAGNITUDE ...
SHIFT = 0.5  # ... are stored in [0, 1] around this


def scale_latents(
    z: Float[Array, "*any"], magnitude: float = MAGNITUDE, shift: float = SHIFT
) -> Float[Array, "*any"]:
    """Latents -> [0, 1], to be stored as an image: clipped beyond ±`magnitude`."""
    return jnp.clip(z / (2 * magnitude) + shift, 0.0, 1.0)


def unscale_latents(
    y: Float[Array, "*any"], magnitude: float = MAGNITUDE, shift: float = SHIFT
) -> Float[Array, "*any"]:
    """[0, 1] -> latents."""
    return (y - shift) * (2 * magnitude)


class Block(nn.Module):
    """relu(x + three convolutions with ReLU between them)."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b *space c"]) -> Float[Array, "b *space c"]:
        def convolution(i, y):
            return conv.Conv(x.shape[-1], dtype=self.dtype, name=f"conv_{i}")(y)

        h = nn.relu(convolution(0, x))
        h = nn.relu(convolution(1, h))
        return nn.relu(x + convolution(2, h))


class Encoder(nn.Module):
    """[-1, 1] -> latents."""

    width: int
    blocks: Sequence[int]
    out: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b *space c"]) -> Float[Array, "b *out k"]:
        h = conv.Conv(self.width, dtype=self.dtype, name="conv_in")((x + 1) / 2)
        padding = [(1, 1)] * (x.ndim - 2)
        for i, blocks in enumerate(self.blocks):
            if i > 0:
                down = conv.Conv(
                    self.width, 3, 2, padding, dtype=self.dtype, bias=False, name=f"down_{i}"
                )
                h = down(h)
            for j in range(blocks):
                h = Block(self.dtype, name=f"level_{i}_block_{j}")(h)
        return conv.Conv(self.out, dtype=self.dtype, name="conv_out")(h)


class Decoder(nn.Module):
    """Latents -> [-1, 1]."""

    width: int
    blocks: Sequence[int]  # coarsest first
    out: int
    dtype: Any

    @nn.compact
    def __call__(self, z: Float[Array, "b *space c"]) -> Float[Array, "b *out k"]:
        z = jnp.tanh(z / LIMIT) * LIMIT
        h = nn.relu(conv.Conv(self.width, dtype=self.dtype, name="conv_in")(z))
        for i, blocks in enumerate(self.blocks):
            if i > 0:
                up = conv.Conv(self.width, dtype=self.dtype, bias=False, name=f"up_{i}")
                h = up(conv.nearest(h, 2))
            for j in range(blocks):
                h = Block(self.dtype, name=f"level_{i}_block_{j}")(h)
        y = conv.Conv(self.out, dtype=self.dtype, name="conv_out")(h)
        return y.astype(jnp.float32) * 2 - 1


class TinyAutoencoder(nn.Module):
    """`TAESD`; the defaults are the one for Stable Diffusion 1 and 2, and for XL."""

    width: int = 64
    encoder_blocks: Sequence[int] = (1, 3, 3, 3)  # at each level, in the order in which data passes
    decoder_blocks: Sequence[int] = (3, 3, 3, 1)
    embed: int = 4  # channels of the latents
    channels: int = 3  # of the data
    dtype: Any = jnp.float32

    def __post_init__(self):
        super().__post_init__()
        if len(self.encoder_blocks) != len(self.decoder_blocks):
            raise ValueError(
                f"encoder_blocks={tuple(self.encoder_blocks)} and decoder_blocks={tuple(self.decoder_blocks)} are "
                "not equally many levels; the decoder would not give the size of the data"
            )

    @property
    def factor(self) -> int:
        """Positions of the data for one of the latents, along each axis."""
        return 2 ** (len(self.encoder_blocks) - 1)

    def setup(self):
        self.encoder = Encoder(self.width, self.encoder_blocks, self.embed, self.dtype)
        self.decoder = Decoder(self.width, self.decoder_blocks, self.channels, self.dtype)

    def encode(self, x: Float[Array, "b *space c"]) -> Float[Array, "b *out k"]:
        """Data in [-1, 1] -> latents as the diffusion model wants them, in float32.

        Raises:
          ValueError: the spatial shape is not divisible by `factor`, or the channels do not fit.
        """
        check_data(self, x)
        return self.encoder(x).astype(jnp.float32)

    def latents(self, x: Float[Array, "b *space c"], rng: Array) -> Float[Array, "b *out k"]:
        """What a diffusion model sees of the data: `encode`, which needs no rng."""
        return self.encode(x)

    def decode(self, z: Float[Array, "b *space c"]) -> Float[Array, "b *out k"]:
        """Latents -> data in about [-1, 1], not clipped, in float32."""
        return self.decoder(z)

    def __call__(self, x: Float[Array, "b *space c"]) -> Float[Array, "b *space c"]:
        """The reconstruction. (Their class rounds the latents to a byte on the way, as if they had been stored.)"""
        return self.decode(self.encode(x))
