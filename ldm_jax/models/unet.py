"""The U-Net of latent diffusion: a noisy array and its time to the output F of the network.

Levels of residual blocks go down in resolution and up again; each block on the way up also reads the
output of its mirror image on the way down (Ronneberger et al. 2015; Ho et al. 2020; Dhariwal & Nichol
2021; Rombach et al. 2022). A condition enters in three ways, each of its own:

    vector    added to the embedding of time, which every residual block reads
    tokens    read by cross-attention
    spatial   concatenated to the channels of x

The layers are those of `UNetModel` in CompVis/latent-diffusion, and with `vector` and depths above one
those of Stable Diffusion XL, for any number of spatial axes. Levels are numbered in the order in which
data passes them: `down_0` is the finest level, `up_0` the coarsest.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from ldm_jax.nn import attention, conv, embeddings, norms, once
from ldm_jax.types import Cond, Residuals

Factory = Callable[..., nn.Module]


class Level(nn.Module):
    """Residual blocks at one resolution, attention after each where wanted, then a change of it.

    On the way down every output is put on the stack of skips; on the way up every block takes one.
    """

    direction: Literal["down", "up"]
    features: int
    blocks: int
    res: Factory
    attend: Factory | None
    resample: Literal["conv", "block"] | None
    stride: conv.PerAxis = 2
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Array, skips: tuple[Array, ...], emb: Array, context: tuple, train: bool
    ) -> tuple[Array, tuple[Array, ...]]:
        down = self.direction == "down"
        for j in range(self.blocks):
            if not down:
                x, skips = jnp.concatenate([x, skips[-1]], axis=-1), skips[:-1]
            x = self.res(self.features, name=f"res_{j}")(x, emb, train)
            if self.attend is not None:
                x = self.attend(name=f"attn_{j}")(x, *context)
            if down:
                skips = (*skips, x)
        if self.resample is None:
            return x, skips
        name = f"{self.direction}sample"
        if self.resample == "block":
            block = self.res(self.features, resample=self.direction, stride=self.stride, name=name)
            x = block(x, emb, train)
        elif down:
            x = conv.Downsample(self.stride, dtype=self.dtype, name=name)(x)
        else:
            x = conv.Upsample(self.stride, dtype=self.dtype, name=name)(x)
        return x, (*skips, x) if down else skips


class Middle(nn.Module):
    """Residual block, attention where wanted, residual block, at the coarsest resolution."""

    res: Factory
    attend: Factory | None

    @nn.compact
    def __call__(self, x: Array, emb: Array, context: tuple, train: bool) -> Array:
        x = self.res(x.shape[-1], name="res_0")(x, emb, train)
        if self.attend is not None:
            x = self.attend(name="attn")(x, *context)
        return self.res(x.shape[-1], name="res_1")(x, emb, train)


def positions(x: Float[Array, "b *space c"]) -> Float[Array, "b *space axes"]:
    """Where each element lies along each spatial axis, from -1 to 1 (CoordConv, Liu et al. 2018).

    Padding with zeros tells convolutions where they are too, but small networks take long to learn from that.
    """
    axes = [jnp.linspace(-1.0, 1.0, size, dtype=x.dtype) for size in x.shape[1:-1]]
    grid = jnp.stack(jnp.meshgrid(*axes, indexing="ij"), axis=-1)
    return jnp.broadcast_to(grid, (x.shape[0], *grid.shape))


class UNet(nn.Module):
    """`UNetModel` of CompVis/latent-diffusion; `heads` or `head_dim` says how attention is split.

    A class, or a level of noise, is a one-hot `cond.vector` with vector_from="table", which then has `vector` rows.
    The table is a part of the network, as in published files, so that they are read, trained and written as a whole;
    and a one-hot vector is dropped (zeros), joined and checked like any other.

    Raises:
      ValueError: a sequence with another length than `mults`, both or none of `heads` and `head_dim`,
        heads or groups that do not divide the widths, or a depth that the kind of attention lacks.
    """

    width: int
    mults: Sequence[int]  # width of each level, in units of `width`; finest first
    blocks: int = 2  # residual blocks a level on the way down; one more on the way up
    attention: Sequence[
        int
    ] = ()  # for each level: depth of the attention after its blocks; 0: none
    middle: int = 1  # depth of the attention in the middle; 0: none
    heads: int | Sequence[int] | None = None  # of attention; for all levels or for each
    head_dim: int | None = None  # instead of `heads`
    transformer: bool = True  # spatial transformers, which read tokens; False: plain self-attention
    projection: Literal["conv", "linear"] = "conv"  # how transformers store proj_in and proj_out
    scale_shift: bool = False  # time scales and shifts instead of being added
    resample_blocks: bool = False  # residual blocks change the resolution instead of convolutions
    dropout: float = 0.0
    out_channels: int | None = None  # None: as many as x has
    groups: int = 32
    stride: conv.PerAxis = 2  # between levels; (1, 2, 2) keeps the frames of a video
    vector: int = 0  # width of `cond.vector`; 0: the network reads none
    vector_from: Literal["mlp", "table"] = "mlp"  # how it reaches the time embedding's width
    coordinates: bool = False  # the input also has its positions, [-1, 1] along each axis
    dtype: Any = jnp.float32
    remat: bool | str = False  # recompute each block in the backward pass; or a name of `once.KEEP`
    only_cross: Sequence[bool] = ()  # for each level: its transformers read nothing but tokens
    eps: float = 1e-5  # of the norms of residual blocks and of the output

    def __post_init__(self):
        super().__post_init__()
        levels, depths = len(self.mults), (*self.attention, self.middle)
        for name in ("attention", "only_cross", "heads"):
            value = getattr(self, name)
            if isinstance(value, Sequence) and len(value) not in (
                (levels,) if name == "heads" else (0, levels)
            ):
                raise ValueError(
                    f"{name}={tuple(value)} has {len(value)} values for {levels} levels "
                    f"(mults={tuple(self.mults)}); give one a level"
                )
        norms.check_groups(self.groups, *(self.width * m for m in self.mults))
        if not self.transformer and max(depths) > 1:
            raise ValueError(
                f"plain attention has a depth of 0 or 1, and attention={tuple(self.attention)}, "
                f"middle={self.middle} ask for more; set transformer=True"
            )
        if any(self.only_cross) and not self.transformer:
            raise ValueError("only_cross needs attention to tokens; set transformer=True")
        if any(depths) and (self.heads is None) == (self.head_dim is None):
            raise ValueError(
                f"attention needs either heads or head_dim and got heads={self.heads}, "
                f"head_dim={self.head_dim}; give one of them"
            )
        for i, depth in enumerate(self._depths()):
            if depth or (i == levels - 1 and self.middle):
                attention.dim_of_head(self.width * self.mults[i], self._heads(i))

    def _depths(self) -> tuple[int, ...]:
        return tuple(self.attention) or (0,) * len(self.mults)

    def _heads(self, level: int) -> int:
        channels = self.width * self.mults[level]
        if self.head_dim is not None:
            if channels % self.head_dim:
                raise ValueError(
                    f"head_dim={self.head_dim} does not divide {channels} channels at level {level}"
                )
            return channels // self.head_dim
        return self.heads if isinstance(self.heads, int) else self.heads[level]

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b *space c"],
        t: Float[Array, " b"],
        cond: Cond = Cond(),  # noqa: B008 (it holds nothing)
        train: bool = False,
    ) -> Float[Array, "b *space k"]:
        """F(x, t, cond) in float32; t as it was trained on, for example [0, 999] or [0, 1].

        With `train`, dropout draws from the rng "dropout".

        Raises:
          ValueError: a spatial shape that the levels do not divide, or a condition that does not fit.
        """
        check(self, x, cond)
        if cond.controls:
            raise ValueError(
                "the condition has controls, which are for ControlNets; wrap the network with `controls.with_controls`"
            )
        out_channels = self.out_channels or x.shape[-1]
        emb = embed(self, t, cond)
        h = conv.Conv(self.width, dtype=self.dtype, name="conv_in")(joined(self, x, cond))
        h, skips = contract(self, h, emb, cond, train)
        if cond.residuals is not None:
            h, skips = _add(cond.residuals, h, skips)
        for i, at in enumerate(reversed(range(len(self.mults)))):
            h, skips = _level(self, "up", at, f"up_{i}")(
                h, skips, emb, _context(self, cond, train), train
            )
        h = nn.silu(norms.GroupNorm(self.groups, self.eps, self.dtype, name="norm_out")(h))
        out = conv.Conv(out_channels, zero=True, dtype=self.dtype, name="conv_out")
        return out(h).astype(jnp.float32)


# What a U-Net shares with a ControlNet: functions that are called by the module whose layers they make. They take from
# `unet` its settings alone.


def check(unet: UNet, x: Array, cond: Cond) -> None:
    """Raises: ValueError: a spatial shape that the levels do not divide, or a condition that does not fit."""
    levels = len(unet.mults)
    total = conv.total_stride(unet.stride, levels)
    conv.check_divisible(x.shape[1:-1], total, f"the stride of {levels} levels")
    reads = unet.transformer and any((*unet._depths(), unet.middle))
    if cond.tokens is not None and not reads:
        raise ValueError(
            "the condition has tokens and this U-Net has no cross-attention; "
            "set transformer=True and a depth in `attention` or `middle`"
        )
    if cond.tokens is None and any(unet.only_cross):
        raise ValueError(
            f"this U-Net reads nothing but tokens at some levels (only_cross={tuple(unet.only_cross)}) and the "
            "condition has none; give tokens"
        )
    if cond.mask is not None and cond.tokens is None:
        raise ValueError("the condition has a mask and no tokens; give both or neither")
    given = 0 if cond.vector is None else cond.vector.shape[-1]
    if given != unet.vector:
        raise ValueError(
            f"this U-Net reads a vector of width {unet.vector} (0: none) and the condition's has "
            f"width {given}; set vector={given} or change the conditioner"
        )
    if cond.spatial is not None and cond.spatial.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"the spatial condition has shape {cond.spatial.shape} and x has {x.shape}; "
            "all axes but the channels must agree"
        )


def joined(unet: UNet, x: Float[Array, "b *space c"], cond: Cond) -> Float[Array, "b *space k"]:
    """What `conv_in` reads."""
    if cond.spatial is not None:
        x = jnp.concatenate([x, cond.spatial.astype(x.dtype)], axis=-1)
    return jnp.concatenate([x, positions(x)], axis=-1) if unet.coordinates else x


def embed(unet: UNet, t: Float[Array, " b"], cond: Cond) -> Float[Array, "b d"]:
    """The embedding that every residual block reads: of time, and of the condition's vector."""
    width = 4 * unet.width
    emb = embeddings.MLP(width, unet.dtype, name="time")(embeddings.sinusoid(t, unet.width))
    if unet.vector:
        make = {"mlp": embeddings.MLP, "table": embeddings.Table}[unet.vector_from]
        emb = emb + make(width, unet.dtype, name="vector")(cond.vector)
    return emb


def contract(
    unet: UNet, h: Float[Array, "b *space c"], emb: Float[Array, "b d"], cond: Cond, train: bool
) -> tuple[Array, tuple[Array, ...]]:
    """Down all levels and through the middle; the middle's output, and the skips on the way, finest first."""
    context = _context(unet, cond, train)
    skips = (h,)
    for i in range(len(unet.mults)):
        h, skips = _level(unet, "down", i, f"down_{i}")(h, skips, emb, context, train)
    attend = _attend(unet, len(unet.mults) - 1, unet.middle)
    return Middle(_res(unet), attend, name="mid")(h, emb, context, train), skips


def _context(unet: UNet, cond: Cond, train: bool) -> tuple:
    return (cond.tokens, cond.mask, train) if unet.transformer else ()


def _level(unet: UNet, direction: Literal["down", "up"], at: int, name: str) -> Level:
    last = at == (len(unet.mults) - 1 if direction == "down" else 0)
    return Level(
        direction,
        unet.width * unet.mults[at],
        unet.blocks + (direction == "up"),
        _res(unet),
        _attend(unet, at, unet._depths()[at], any(unet.only_cross) and unet.only_cross[at]),
        None if last else "block" if unet.resample_blocks else "conv",
        unet.stride,
        unet.dtype,
        name=name,
    )


def _res(unet: UNet) -> Factory:
    return partial(
        once.once(conv.ResBlock, unet.remat, (3,)),
        groups=unet.groups,
        eps=unet.eps,
        scale_shift=unet.scale_shift,
        dropout=unet.dropout,
        dtype=unet.dtype,
    )


def _attend(unet: UNet, level: int, depth: int, only_cross: bool = False) -> Factory | None:
    if not depth:
        return None
    common = dict(heads=unet._heads(level), groups=unet.groups, dtype=unet.dtype)
    if unet.transformer:
        return partial(
            attention.SpatialTransformer,
            depth=depth,
            projection=unet.projection,
            dropout=unet.dropout,
            remat=unet.remat,
            only_cross=only_cross,
            **common,
        )
    block = once.once(attention.AttentionBlock, unet.remat)
    return partial(block, eps=unet.eps, **common)


def _add(residuals: Residuals, h: Array, skips: tuple[Array, ...]) -> tuple[Array, tuple]:
    to, what = (*skips, h), (*residuals.skips, residuals.mid)
    fit = len(to) == len(what) and all(
        a.ndim == r.ndim
        and all(m in (n, 1) for n, m in zip(a.shape[1:-1], r.shape[1:-1], strict=True))
        and (a.shape[0], a.shape[-1]) == (r.shape[0], r.shape[-1])
        for a, r in zip(to, what, strict=True)
    )
    if not fit:
        raise ValueError(
            f"the residuals have the shapes {[r.shape for r in what]} and the skips and the middle of this U-Net "
            f"{[a.shape for a in to]}; use a ControlNet that was made for such a U-Net"
        )
    *skips, h = (a + r.astype(a.dtype) for a, r in zip(to, what, strict=True))
    return h, tuple(skips)
