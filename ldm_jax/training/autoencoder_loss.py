"""The loss of the first stage: reconstruction, KL or codebook, and from a start step on a PatchGAN.

Esser et al. 2021 (eq. 7) and Rombach et al. 2022 (appendix G):

    loss = |x - x̂| + perceptual + bottleneck + w * disc_weight * -D(x̂)
    w    = ‖∇ reconstruction‖ / (‖∇ -D(x̂)‖ + 1e-4), in [0, 1e4], the gradients taken at the last decoder kernel

and for the discriminator the hinge loss (Lim & Ye 2017). The two players' gradients come out of one backward pass,
since each sees the other behind a stop_gradient. Means are over the batch; over the elements of a sample it is by name:

    "sum"      data and latents are summed, as CompVis trains its KL models: LPIPS, one number a sample, counts for each
               element of the data. The loss grows with the size of the pictures
    "mean"     both are averaged, as CompVis trains its VQ models
    "element"  "sum" divided by the number of elements of the data: the weights of "sum" mean the same, and neither the
               loss nor its gradient depends on the size of the pictures

CompVis divides its KL models' reconstruction by exp(logvar), which stays at 1: the optimizer there does not have it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from ldm_jax.metrics.image import psnr
from ldm_jax.training.bottleneck import Bottleneck
from ldm_jax.types import Loss, Params

# (arrays, x, y) -> distance per sample
Perceptual = Callable[
    [Params, Float[Array, "b *space c"], Float[Array, "b *space c"]], Float[Array, " b"]
]

# (elements of a sample, of its latents) -> by what the means over both are multiplied
NORMALIZATIONS: dict[str, Callable[[int, int], tuple[float, float]]] = {
    "sum": lambda data, latents: (data, latents),
    "mean": lambda data, latents: (1.0, 1.0),
    "element": lambda data, latents: (1.0, latents / data),
}
LAST_KERNEL = ("decoder", "conv_out", "kernel")


def hinge_discriminator(real: Array, fake: Array) -> Float[Array, ""]:
    """The discriminator's hinge loss: half of E[max(0, 1 - D(x))] + E[max(0, 1 + D(x̂))]."""
    return 0.5 * (jnp.mean(nn.relu(1.0 - real)) + jnp.mean(nn.relu(1.0 + fake)))


def adaptive_weight(
    pull: Callable[[Array], Sequence[Array]], for_reconstruction: Array, for_generator: Array
) -> Float[Array, ""]:
    """‖∇nll‖ / (‖∇g‖ + 1e-4) at the last kernel, in [0, 1e4]; 0 when it is not finite.

    `pull` maps a cotangent of the reconstruction to one of the kernel.
    """
    nll, generator = (jnp.linalg.norm(pull(c)[0]) for c in (for_reconstruction, for_generator))
    weight = nll / (generator + 1e-4)
    return jax.lax.stop_gradient(jnp.where(jnp.isfinite(weight), jnp.clip(weight, 0.0, 1e4), 0.0))


def _with_last_kernel(params: Params, kernel: Array, path: Sequence[str] = LAST_KERNEL) -> Params:
    if not path:
        return kernel
    return params | {path[0]: _with_last_kernel(params[path[0]], kernel, path[1:])}


def autoencoder_loss(
    bottleneck: Bottleneck,
    discriminator: nn.Module | None = None,
    *,
    kind: str = "l1",
    normalization: str = "sum",
    disc_start: int = 50_001,
    disc_weight: float = 0.5,
    perceptual: Perceptual | None = None,
    perceptual_weight: float = 1.0,
) -> Loss:
    """A Loss over params = {"gen": ..., "disc": ...}; `frozen` holds the arrays of the perceptual term.

    Raises:
      ValueError: `kind` is neither "l1" nor "l2", or an unknown normalization.
    """
    distances: dict[str, Any] = {"l1": jnp.abs, "l2": jnp.square}
    if kind not in distances:
        raise ValueError(f"objective.kind {kind!r} is unknown; choose 'l1' or 'l2'")
    if normalization not in NORMALIZATIONS:
        raise ValueError(
            f"objective.normalization {normalization!r} is unknown; choose among {sorted(NORMALIZATIONS)}"
        )
    distance, scales = distances[kind], NORMALIZATIONS[normalization]
    decode = bottleneck.decode

    def loss(params, frozen, batch, rng, step):
        x, gen = batch["x"], params["gen"]
        coded = bottleneck.encode(gen, x, rng)
        of_data, of_latents = scales(x[0].size, coded.latents[0].size)

        def nll(reconstruction):
            mean = jnp.mean(distance(x - reconstruction))
            if perceptual is not None:
                mean += perceptual_weight * jnp.mean(perceptual(frozen, x, reconstruction))
            return of_data * mean

        reconstruction = decode(gen, coded.latents)
        total = nll(reconstruction) + of_latents * coded.loss
        metrics = coded.metrics | {
            "reconstruction": jnp.mean(distance(x - reconstruction)),
            "psnr": jnp.mean(psnr(x, jnp.clip(reconstruction, -1.0, 1.0))),
        }
        if discriminator is None:
            return total, metrics

        def judge(weights, x):
            return discriminator.apply({"params": weights}, x)

        def generator_loss(reconstruction):
            return -jnp.mean(judge(jax.lax.stop_gradient(params["disc"]), reconstruction))

        def adversarial():
            constant, fixed = jax.lax.stop_gradient((reconstruction, gen))
            kernel = fixed
            for key in LAST_KERNEL:
                kernel = kernel[key]
            still = jax.lax.stop_gradient(coded.latents)
            _, pull = jax.vjp(lambda k: decode(_with_last_kernel(fixed, k), still), kernel)
            weight = adaptive_weight(
                pull, jax.grad(nll)(constant), jax.grad(generator_loss)(constant)
            )
            generator = generator_loss(reconstruction)
            hinge = hinge_discriminator(judge(params["disc"], x), judge(params["disc"], constant))
            return weight * disc_weight * generator + hinge, {
                "disc_weight": weight,
                "generator": generator,
                "discriminator": hinge,
            }

        def quiet():
            zero = jnp.zeros(())
            return zero, {"disc_weight": zero, "generator": zero, "discriminator": zero}

        players, extra = jax.lax.cond(step >= disc_start, adversarial, quiet)
        return total + players, metrics | extra

    return loss
