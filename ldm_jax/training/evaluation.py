"""What is measured while a run trains, on batches and noise that never change."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from ldm_jax import media
from ldm_jax.metrics import image as metrics
from ldm_jax.models.autoencoder import Gaussian
from ldm_jax.training import codebook, sharding
from ldm_jax.training.run import Evaluation
from ldm_jax.types import Loss, Params

Batches = Sequence[dict[str, np.ndarray]]


def _mean(values: Sequence[dict[str, Any]]) -> dict[str, float]:
    fetched = jax.device_get(list(values))
    return {k: float(np.mean([v[k] for v in fetched])) for k in fetched[0]}


def autoencoder(
    model: nn.Module, mesh: Mesh, batches: Batches, shown: int
) -> Callable[[Params, Params], Evaluation]:
    """PSNR (dB) and SSIM of the reconstructions from the posterior's mean; originals above reconstructions.

    Of a model with codes also their usage and perplexity over all batches together.
    """

    @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
    def reconstruct(params, x):
        def call(method, given):
            return model.apply({"params": params}, given, method=method)

        z, shares = call("encode", x), None
        if isinstance(z, Gaussian):
            z = z.mean
        else:
            shares = codebook.histogram(call("quantize", z)[1], model.codes)
        y = jnp.clip(call("decode", z), -1.0, 1.0)
        scalars = {"psnr": jnp.mean(metrics.psnr(x, y)), "ssim": jnp.mean(metrics.ssim(x, y))}
        return x[:shown], y[:shown], scalars, shares

    def evaluate(params, frozen):
        results = [reconstruct(params["gen"], sharding.place(mesh, b)["x"]) for b in batches]
        scalars = _mean([r[2] for r in results])
        if results[0][3] is not None:
            shares = jnp.mean(jnp.stack([r[3] for r in results]), axis=0)
            scalars["usage"] = float(codebook.usage(shares))
            scalars["perplexity"] = float(codebook.perplexity(shares))
        x, y = jax.device_get(results[0][:2])
        both = media.to_uint8(np.concatenate([x, y]))
        scalars = {f"validation/{k}": v for k, v in scalars.items()}
        return Evaluation(scalars, {"reconstructions": media.grid(both, columns=len(x))})

    return evaluate


def diffusion(
    loss: Loss,
    mesh: Mesh,
    batches: Batches,
    draw: Callable[[Params, Params], np.ndarray],
    captions: Sequence[str] | None,
) -> Callable[[Params, Params], Evaluation]:
    """The loss on fixed times and noise, and a grid of samples with fixed seeds: `draw(params, frozen)`, in [-1, 1]."""
    at = jnp.zeros((), jnp.int32)

    @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
    def measure(params, frozen, batch, key):
        return loss(params, frozen, batch, key, at)[0]

    def evaluate(params, frozen):
        losses = [
            {"loss": measure(params, frozen, sharding.place(mesh, b), jax.random.key(i))}
            for i, b in enumerate(batches)
        ]
        images = media.to_uint8(draw(params, frozen))
        columns = int(np.ceil(np.sqrt(len(images))))
        grid = media.grid(images, columns=columns, captions=captions)
        return Evaluation(
            {f"validation/{k}": v for k, v in _mean(losses).items()}, {"samples": grid}
        )

    return evaluate
