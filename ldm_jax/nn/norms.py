"""Group normalisation (Wu & He 2018) of channels-last arrays, with any number of spatial dimensions.

One pass over the data gives the mean and the variance of every channel c, and these give those of a group:

    mean = E_c[m_c]        variance = E_c[v_c] + E_c[(m_c - mean)²]

with v_c = E[(x - x_0)²] - E[x - x_0]². Subtracting one of the channel's own values, x_0, costs little and keeps the
difference from cancelling when the mean is far larger than the deviation. The result is then one multiplication and one
addition for each element.

On the CPU the values of groups come to their channels by a product with zeros and ones. It gives the same numbers as
repeating them, and keeps XLA from looking up the group of each element in the loop over all of them, which cannot be
vectorised then and takes twice the time.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from ldm_jax.nn.attend import platform


def check_groups(groups: int, *channels: int) -> None:
    """Raises: ValueError: the groups do not divide one of these numbers of channels."""
    for c in channels:
        if c % groups:
            raise ValueError(
                f"groups={groups} does not divide {c} channels; "
                f"set the network's `groups` to a divisor of all its widths"
            )


class GroupNorm(nn.Module):
    """Zero mean and unit variance over positions and the channels of a group; statistics in float32."""

    groups: int = 32
    eps: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b *space c"]) -> Float[Array, "b *space c"]:
        """Raises: ValueError: the groups do not divide the channels."""
        channels = x.shape[-1]
        check_groups(self.groups, channels)
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        space = tuple(range(1, x.ndim - 1))

        x = x.astype(jnp.float32)
        x_0 = jax.lax.stop_gradient(x[(slice(None), *(slice(0, 1) for _ in space))])
        y = x - x_0
        shifted = y.mean(space, keepdims=True)
        variance = jnp.maximum(jnp.square(y).mean(space, keepdims=True) - jnp.square(shifted), 0.0)
        mean = x_0 + shifted

        def of_group(z):
            grouped = z.reshape(z.shape[0], self.groups, -1).mean(-1)
            return _spread(grouped, channels // self.groups).reshape(z.shape)

        group_mean = of_group(mean)
        variance = of_group(variance + jnp.square(mean - group_mean))
        factor = scale * jax.lax.rsqrt(variance + self.eps)
        return (x * factor + (bias - group_mean * factor)).astype(self.dtype)


def _spread(z: Float[Array, "b g"], times: int) -> Float[Array, "b c"]:
    """Each value so many times behind each other; on the CPU a NaN or an infinite value makes all of them NaN."""
    if platform() != "cpu":
        return jnp.repeat(z, times, axis=-1)
    places = jnp.repeat(jnp.eye(z.shape[-1], dtype=z.dtype), times, axis=-1)
    return jnp.matmul(z, places, precision="highest")
