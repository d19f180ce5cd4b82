"""The KL autoencoder: data to a small array of latents and back (Rombach et al. 2022, section 3.1).

The encoder gives mean and log-variance of a Gaussian over latents z; the decoder maps a sample of it
back to data. Each level but the last halves the spatial axes, so that a position of z stands for
`factor` positions of x along each axis:

    x [b *space c]  ->  z [b *space/factor embed]  ->  x̂ [b *space c]

The layers are those of `AutoencoderKL` in CompVis/latent-diffusion, for any number of spatial axes.
Levels are numbered in the order in which data passes them: `encoder/down_0` is the finest level,
`decoder/up_0` the coarsest.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Float

from ldm_jax.nn import attention, conv, norms, once

EPS = 1e-6  # of every norm here; a U-Net's is 1e-5
Factory = Callable[..., nn.Module]


class Gaussian(struct.PyTreeNode):
    """A Gaussian with independent elements."""

    mean: Any  # [b *space c]
    logvar: Any  # [b *space c], in [-30, 20]

    def sample(self, rng: Array) -> Float[Array, "b *space c"]:
        noise = jax.random.normal(rng, self.mean.shape, self.mean.dtype)
        return self.mean + jnp.exp(0.5 * self.logvar) * noise

    def kl(self) -> Float[Array, " b"]:
        """KL(N(mean, var) ‖ N(0, 1)) in nats, summed over a sample's elements."""
        each = jnp.square(self.mean) + jnp.exp(self.logvar) - 1.0 - self.logvar
        return 0.5 * jnp.sum(each, axis=tuple(range(1, each.ndim)))


class Level(nn.Module):
    """Residual blocks at one resolution, attention after each where wanted, then a change of it."""

    features: int
    blocks: int
    res: Factory
    attend: Factory | None
    resample: Literal["down", "up"] | None
    stride: conv.PerAxis = 2
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b *space c"], train: bool = False
    ) -> Float[Array, "b *out k"]:
        for j in range(self.blocks):
            x = self.res(self.features, name=f"res_{j}")(x, None, train)
            if self.attend is not None:
                x = self.attend(name=f"attn_{j}")(x)
        if self.resample == "down":
            x = conv.Downsample(self.stride, (0, 1), self.dtype, name="downsample")(x)
        elif self.resample == "up":
            x = conv.Upsample(self.stride, self.dtype, name="upsample")(x)
        return x


class Middle(nn.Module):
    """Residual block, attention where wanted, residual block, at the coarsest resolution."""

    res: Factory
    attend: Factory | None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b *space c"], train: bool = False
    ) -> Float[Array, "b *space c"]:
        x = self.res(x.shape[-1], name="res_0")(x, None, train)
        if self.attend is not None:
            x = self.attend(name="attn")(x)
        return self.res(x.shape[-1], name="res_1")(x, None, train)


class Half(nn.Module):
    """The encoder (`direction` "down") or the decoder ("up")."""

    direction: Literal["down", "up"]
    widths: Sequence[int]  # in the order in which data passes the levels
    blocks: int
    attention: Sequence[bool]  # in the same order
    middle_attention: bool
    out: int
    res: Factory
    attend: Factory
    groups: int
    stride: conv.PerAxis
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, "b *space c"], train: bool = False
    ) -> Float[Array, "b *out k"]:
        middle = Middle(self.res, self.attend if self.middle_attention else None, name="mid")
        h = conv.Conv(self.widths[0], dtype=self.dtype, name="conv_in")(x)
        if self.direction == "up":
            h = middle(h, train)
        for i, (width, attends) in enumerate(zip(self.widths, self.attention, strict=True)):
            level = Level(
                width,
                self.blocks,
                self.res,
                self.attend if attends else None,
                self.direction if i < len(self.widths) - 1 else None,
                self.stride,
                self.dtype,
                name=f"{self.direction}_{i}",
            )
            h = level(h, train)
        if self.direction == "down":
            h = middle(h, train)
        h = nn.silu(norms.GroupNorm(self.groups, EPS, self.dtype, name="norm_out")(h))
        return conv.Conv(self.out, dtype=self.dtype, name="conv_out")(h)


def halves(of: Any, out: int) -> tuple[Half, Half]:
    """Encoder and decoder by the settings of an autoencoder of this shape; `out` are the encoder's channels."""
    widths = tuple(of.width * m for m in of.mults)
    attends = tuple(of.attention) or (False,) * len(widths)
    common = dict(groups=of.groups, eps=EPS, zero=False, dtype=of.dtype)
    half = partial(
        Half,
        middle_attention=of.middle_attention,
        res=partial(once.once(conv.ResBlock, of.remat, (3,)), dropout=of.dropout, **common),
        attend=partial(once.once(attention.AttentionBlock, of.remat), **common),
        groups=of.groups,
        stride=of.stride,
        dtype=of.dtype,
    )
    encoder = half(direction="down", widths=widths, blocks=of.blocks, attention=attends, out=out)
    decoder = half(
        direction="up",
        widths=widths[::-1],
        blocks=of.blocks + 1,
        attention=attends[::-1],
        out=of.channels,
    )
    return encoder, decoder


def check_settings(of: Any) -> None:
    """Raises: ValueError: `attention` with another length than `mults`, or `groups` that do not divide."""
    norms.check_groups(of.groups, *(of.width * m for m in of.mults))
    if of.attention and len(of.attention) != len(of.mults):
        raise ValueError(
            f"attention={tuple(of.attention)} has {len(of.attention)} values for "
            f"{len(of.mults)} levels (mults={tuple(of.mults)}); give one a level, or ()"
        )


def check_data(of: Any, x: Array) -> None:
    """Raises: ValueError: the spatial shape is not divisible by `factor`, or the channels do not fit."""
    if x.shape[-1] != of.channels:
        raise ValueError(
            f"the autoencoder is built for channels={of.channels} and got data of shape {x.shape}"
        )
    conv.check_divisible(x.shape[1:-1], of.factor, "the autoencoder's factor")


class KLAutoencoder(nn.Module):
    """`AutoencoderKL` of CompVis/latent-diffusion; the defaults are its f = 8 model.

    Raises:
      ValueError: `attention` with another length than `mults`, `groups` that do not divide, or `embed` other than
        `z_channels` without the matrices between them.
    """

    width: int = 128
    mults: Sequence[int] = (1, 2, 4, 4)  # width of each level, in units of `width`; finest first
    blocks: int = 2  # residual blocks a level of the encoder; the decoder has one more
    z_channels: int = 4  # channels between encoder and decoder ...
    embed: int = 4  # ... and of the latents, mapped by one matrix each way
    attention: Sequence[bool] = ()  # for each level: attention after its blocks; empty: nowhere
    middle_attention: bool = True
    channels: int = 3  # of the data
    groups: int = 32
    stride: conv.PerAxis = 2  # between levels; (1, 2, 2) keeps the frames of a video
    dropout: float = 0.0
    dtype: Any = jnp.float32
    remat: bool | str = False  # recompute each block in the backward pass; or a name of `once.KEEP`
    use_quant_conv: bool = True  # the matrix between encoder and latents ...
    use_post_quant_conv: bool = True  # ... and the one between latents and decoder

    def __post_init__(self):
        super().__post_init__()
        check_settings(self)
        if not (self.use_quant_conv and self.use_post_quant_conv) and self.embed != self.z_channels:
            raise ValueError(
                f"embed={self.embed} and z_channels={self.z_channels} differ, so both matrices between them are "
                "needed; set use_quant_conv and use_post_quant_conv to True, or make the numbers equal"
            )

    @property
    def factor(self) -> int | tuple[int, ...]:
        """Positions of the data for one of the latents, along each axis."""
        return conv.total_stride(self.stride, len(self.mults))

    def setup(self):
        self.encoder, self.decoder = halves(self, 2 * self.z_channels)
        if self.use_quant_conv:
            self.quant_conv = conv.Conv(2 * self.embed, 1, dtype=self.dtype)
        if self.use_post_quant_conv:
            self.post_quant_conv = conv.Conv(self.z_channels, 1, dtype=self.dtype)

    def encode(self, x: Float[Array, "b *space c"], train: bool = False) -> Gaussian:
        """Data in [-1, 1] -> the Gaussian over its latents, in float32.

        Raises:
          ValueError: the spatial shape is not divisible by `factor`, or the channels do not fit.
        """
        check_data(self, x)
        moments = self.encoder(x, train)
        if self.use_quant_conv:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return Gaussian(mean, jnp.clip(logvar, -30.0, 20.0))

    def latents(
        self, x: Float[Array, "b *space c"], rng: Array, train: bool = False
    ) -> Float[Array, "b *out k"]:
        """What a diffusion model sees of the data: a sample of the posterior; raises as `encode`."""
        return self.encode(x, train).sample(rng)

    def decode(
        self, z: Float[Array, "b *space c"], train: bool = False
    ) -> Float[Array, "b *out k"]:
        """Latents -> data in about [-1, 1], in float32."""
        if self.use_post_quant_conv:
            z = self.post_quant_conv(z)
        return self.decoder(z, train).astype(jnp.float32)

    def __call__(
        self, x: Float[Array, "b *space c"], rng: Array, train: bool = False
    ) -> tuple[Float[Array, "b *space c"], Gaussian]:
        """The reconstruction from a sample of the posterior, and the posterior; raises as `encode`."""
        posterior = self.encode(x, train)
        return self.decode(posterior.sample(rng), train), posterior
