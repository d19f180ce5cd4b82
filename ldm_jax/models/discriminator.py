"""The patch discriminator of the autoencoder's adversarial loss (Isola et al. 2017, section 3.2.2).

A stack of convolutions with kernel 4: `layers` of them halve each axis, two more keep the stride at
1, and each output is the score of one patch, not of the whole image. With 3 layers a score sees 70
positions along each axis. Reference: `NLayerDiscriminator` in taming-transformers, in any number of
spatial dimensions.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

NORMS = ("batch", "group")
EPS = 1e-5
init = nn.initializers.normal(0.02)


def around_one(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
    """Scales drawn from N(1, 0.02), as the reference draws those of its norms."""
    return 1 + init(key, shape, dtype)


class BatchNorm(nn.Module):
    """Each channel normalised over the batch and all positions (Ioffe & Szegedy 2015, Alg. 1).

    A discriminator only ever runs in training, where running averages are not read: so none are
    kept, and a step stays a pure function of parameters and batch. Under `jit` the statistics are
    those of the global batch, however it is sharded. Float32 inside.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b *space c"]) -> Float[Array, "b *space c"]:
        scale = self.param("scale", around_one, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        y = x.astype(jnp.float32)
        axes = tuple(range(x.ndim - 1))
        y = y - y.mean(axes)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(axes) + EPS)
        return (y * scale + bias).astype(self.dtype)


class PatchGAN(nn.Module):
    """Scores of overlapping patches, positive for real ones; float32, as the hinge loss wants them.

    norm="batch" is the reference. norm="group" does not mix the samples of a batch: take it when
    batches are small.
    """

    width: int = 64
    layers: int = 3
    norm: str = "batch"
    groups: int = 32  # of norm="group"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b *space c"]) -> Float[Array, "b *patches 1"]:
        """Data in [-1, 1] -> one score a patch.

        Raises:
          ValueError: an unknown norm, groups that do not divide the width, or too small an input.
        """
        rank, smallest = x.ndim - 2, 3 * 2**self.layers
        if self.norm not in NORMS:
            raise ValueError(f"the norm {self.norm!r} is unknown; choose among {NORMS}")
        if self.norm == "group" and self.width % self.groups:
            raise ValueError(f"groups={self.groups} does not divide width={self.width}")
        if min(x.shape[1:-1]) < smallest:
            raise ValueError(
                f"a discriminator of {self.layers} layers needs at least {smallest} positions "
                f"along each axis and got {x.shape[1:-1]}; use fewer layers"
            )

        def conv(name, features, stride, bias=True):
            return nn.Conv(
                features,
                (4,) * rank,
                stride,
                1,
                use_bias=bias,
                kernel_init=init,
                dtype=self.dtype,
                name=name,
            )

        def norm(name):
            if self.norm == "batch":
                return BatchNorm(dtype=self.dtype, name=name)
            return nn.GroupNorm(
                self.groups, epsilon=EPS, scale_init=around_one, dtype=self.dtype, name=name
            )

        h = nn.leaky_relu(conv("conv_0", self.width, 2)(x), 0.2)
        for i in range(1, self.layers + 1):
            features, stride = self.width * min(2**i, 8), 2 if i < self.layers else 1
            # Batch statistics take any bias away again.
            h = conv(f"conv_{i}", features, stride, bias=self.norm == "group")(h)
            h = nn.leaky_relu(norm(f"norm_{i}")(h), 0.2)
        return conv("conv_out", 1, 1)(h).astype(jnp.float32)
