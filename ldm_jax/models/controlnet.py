"""ControlNet: a copy of a U-Net's way down that is shown a hint, and tells the U-Net what to add (Zhang et al. 2023).

A hint is an image as large as the data: edges, depth, a pose. A few convolutions bring it to the resolution of the
latents, where it is added to what `conv_in` makes of x. Every skip and the output of the middle leave through a 1x1
convolution that starts at zero, so that an untrained ControlNet changes nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from ldm_jax.models import unet as unets
from ldm_jax.nn import conv
from ldm_jax.types import Cond, Residuals

COPIED = ("time", "vector", "conv_in", "down_", "mid")  # how the names of the copied parts begin


class HintNet(nn.Module):
    """Convolutions from the resolution of the data to that of the latents; zero at the start."""

    features: int
    widths: Sequence[int] = (16, 32, 96, 256)  # each but the last ends in a convolution of `stride`
    stride: conv.PerAxis = 2
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, hint: Float[Array, "b *space k"]) -> Float[Array, "b *out c"]:
        def layer(h, name, features, stride=1):
            return conv.Conv(features, 3, stride, dtype=self.dtype, name=name)(h)

        h = nn.silu(layer(hint, "conv_in", self.widths[0]))
        for i, (width, wider) in enumerate(zip(self.widths[:-1], self.widths[1:], strict=True)):
            h = nn.silu(layer(h, f"conv_{2 * i}", width))
            h = nn.silu(layer(h, f"conv_{2 * i + 1}", wider, self.stride))
        return conv.Conv(self.features, zero=True, dtype=self.dtype, name="conv_out")(h)


class ControlNet(nn.Module):
    """What a U-Net with the settings of `unet` is to add, for a hint; the parameters of `unet` are not used."""

    unet: unets.UNet
    hint: Sequence[int] = (16, 32, 96, 256)  # widths of the hint's convolutions
    spatial: bool = False  # it reads the spatial condition, too; most published ones do not
    pool: bool = False  # residuals are means over the positions (`global_pool_conditions`)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b *space c"],
        t: Float[Array, " b"],
        cond: Cond,
        hint: Float[Array, "b *data k"],
        train: bool = False,
    ) -> Residuals:
        """For a U-Net that reads the same (x, t, cond); the hint as it was trained on, mostly in [0, 1].

        Raises:
          ValueError: a hint of another size than the data, or inputs that do not fit the U-Net.
        """
        net = self.unet
        if not self.spatial:
            cond = cond.replace(spatial=None)
        unets.check(net, x, cond)
        total = conv.per_axis(conv.total_stride(net.stride, len(self.hint)), x.ndim - 2)
        wanted = tuple(n * s for n, s in zip(x.shape[1:-1], total, strict=True))
        if hint.shape[:-1] != (x.shape[0], *wanted):
            raise ValueError(
                f"the hint has shape {hint.shape} and x has {x.shape}; this ControlNet reads hints [{x.shape[0]}, "
                f"{', '.join(map(str, wanted))}, channels]"
            )
        emb = unets.embed(net, t, cond)
        h = conv.Conv(net.width, dtype=net.dtype, name="conv_in")(unets.joined(net, x, cond))
        h = h + HintNet(net.width, self.hint, net.stride, net.dtype, name="hint")(hint)
        h, skips = unets.contract(net, h, emb, cond, train)

        def leave(y, name):
            if self.pool:  # before the convolution, which is linear: it gives the same
                y = y.mean(tuple(range(1, y.ndim - 1)), keepdims=True)
            return conv.Conv(y.shape[-1], 1, zero=True, dtype=net.dtype, name=name)(y)

        return Residuals(
            skips=tuple(leave(skip, f"zero_{i}") for i, skip in enumerate(skips)),
            mid=leave(h, "zero_mid"),
        )


def copied(params: Mapping[str, Any], unet: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a fresh ControlNet with those of a trained U-Net in its copied parts: where training starts.

    Where the U-Net also reads a spatial condition and the ControlNet does not, `conv_in` takes the channels of x.
    """
    parts = {name: unet[name] if name.startswith(COPIED) else part for name, part in params.items()}
    channels = params["conv_in"]["kernel"].shape[-2]
    kernel = unet["conv_in"]["kernel"][..., :channels, :]
    return parts | {"conv_in": {**unet["conv_in"], "kernel": kernel}}
