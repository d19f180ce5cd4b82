"""A variational autoencoder (Kingma & Welling 2014) on the networks of the first stage; its samples are of the prior.

    loss = log(|x - x̂|^2 / D) / 2 + KL(q(z | x) || N(0, 1)) / D

in nats a value of D: the bound with a normal decoder of the best standard deviation, which is the root of the batch's
mean squared error (Rybkin et al. 2021, eq. 7), so that no weight is left to choose.
"""

import jax.numpy as jnp
from flax import linen as nn

from ldm_jax.types import Loss


def vae_loss(model: nn.Module) -> Loss:
    """A Loss over the parameters {"gen": those of a `KLAutoencoder`}."""

    def loss(params, frozen, batch, rng, step):
        x, variables = batch["x"], {"params": params["gen"]}
        posterior = model.apply(variables, x, method="encode")
        y = model.apply(variables, posterior.sample(rng), method="decode")
        error = jnp.mean(jnp.square(x - y))
        kl = jnp.mean(posterior.kl()) / x[0].size
        return 0.5 * jnp.log(error) + kl, {"mse": error, "kl": kl}

    return loss
