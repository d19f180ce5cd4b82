"""What lies between encoder and decoder while a first stage trains: a Gaussian that is sampled, or codes.

Each gives the latents that the decoder is shown, and what is paid for them: KL(posterior ‖ N(0, 1)), the loss of a
codebook, or nothing for finite scalars, whose bound is all that they need.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ldm_jax.models import vq
from ldm_jax.training import codebook
from ldm_jax.types import Params


class Coded(NamedTuple):
    """A batch between encoder and decoder."""

    latents: Float[Array, "b *space d"]  # as the decoder is shown them
    loss: Float[Array, ""]  # weighted; the mean over batch and elements of the latents
    metrics: dict[str, Any]


class Bottleneck(NamedTuple):
    encode: Callable[[Params, Array, Array], Coded]  # (params["gen"], x, rng)
    decode: Callable[[Params, Array], Array]  # (params["gen"], latents) -> x̂, float32


def gaussian(model: Any, kl_weight: float = 1e-6) -> Bottleneck:
    """A sample of the posterior of `models.autoencoder.KLAutoencoder`, and its KL."""

    def encode(params, x, rng):
        posterior = model.apply({"params": params}, x, method="encode")
        kl = jnp.mean(posterior.kl())
        loss = kl_weight * kl / posterior.mean[0].size
        return Coded(posterior.sample(rng), loss, {"kl": kl})

    def decode(params, z):
        return model.apply({"params": params}, z, method="decode").astype(jnp.float32)

    return Bottleneck(encode, decode)


def quantized(
    model: Any,
    codebook_weight: float = 1.0,
    beta: float = 0.25,
    legacy: bool = True,
    rule: codebook.Rule | None = None,
) -> Bottleneck:
    """The entries of `models.vq.VQAutoencoder`, and its codebook's loss with `beta` and `legacy` as there.

    With a `rule` of the codebook, what the batch chose is told to it; one that does not learn by the gradient leaves
    beta times the commitment alone of the loss. `usage` and `perplexity` are those of the batch.
    """

    def encode(params, x, rng):
        def call(method, given):
            return model.apply({"params": params}, given, method=method)

        z = call("encode", x)
        entries, indices = call("quantize", z)
        shares = codebook.histogram(indices, model.codes)
        metrics = {"usage": codebook.usage(shares), "perplexity": codebook.perplexity(shares)}
        if model.levels:
            return Coded(entries, jnp.zeros(()), metrics)
        nearest = call("lookup", indices)
        metrics["commitment"] = jnp.mean(jnp.square(jax.lax.stop_gradient(nearest - z)))
        if rule is None or rule.by_gradient:
            loss = vq.codebook_loss(z, nearest, beta, legacy)
        else:
            loss = beta * jnp.mean(jnp.square(jax.lax.stop_gradient(nearest) - z))
        if rule is not None:
            metrics["_chosen"] = codebook.chosen(z, indices, model.codes, rng)
        return Coded(entries, codebook_weight * loss, metrics)

    def decode(params, entries):
        given = dict(method="decode", quantized=True)
        return model.apply({"params": params}, entries, **given).astype(jnp.float32)

    return Bottleneck(encode, decode)
