"""A generative adversarial network (Goodfellow et al. 2014): a decoder draws, the first stage's discriminator judges.

Hinge losses (Lim & Ye 2017) as in the first stage, and for the discriminator half of the squared gradient at real
pictures times `r1` (Mescheder et al. 2018, eq. 9). Both players' gradients
come out of one backward pass, since each sees the other behind a stop_gradient.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from ldm_jax.training.autoencoder_loss import hinge_discriminator
from ldm_jax.types import Loss


def gan_loss(
    generator: nn.Module, discriminator: nn.Module, latent: Sequence[int], r1: float = 1.0
) -> Loss:
    """A Loss over {"gen": the parameters of a decoder of N(0, 1) of shape `latent`, "disc": the discriminator's}."""

    def loss(params, frozen, batch, rng, step):
        x = batch["x"]
        z = jax.random.normal(rng, (len(x), *latent))
        y = generator.apply({"params": params["gen"]}, z, method="decode")

        def judge(weights, x):
            return discriminator.apply({"params": weights}, x)

        fools = -jnp.mean(judge(jax.lax.stop_gradient(params["disc"]), y))
        real, pull = jax.vjp(lambda x: judge(params["disc"], x), x)
        hinge = hinge_discriminator(real, judge(params["disc"], jax.lax.stop_gradient(y)))
        # The gradient of a picture's mean score: no sample sees another one.
        slope = pull(jnp.full_like(real, 1 / real[0].size))[0]
        penalty = jnp.mean(jnp.square(slope).reshape(len(x), -1).sum(1))
        told = {"generator": fools, "discriminator": hinge, "penalty": penalty}
        return fools + hinge + 0.5 * r1 * penalty, told

    return loss
