"""Guidance by gradients: towards what a function of the picture finds likely, a classifier, CLIP, a measurement.

The score of p(x_t | y) is that of p(x_t) plus the gradient of log p(y | x_t). With score = -eps / sigma,

    eps = eps - scale sigma grad,    x0 = x0 + scale sigma^2 / alpha grad

where grad is by x_t. At pure noise (alpha = 0) x_t says nothing of y, the gradient is zero, and nothing is changed.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from ldm_jax.diffusion.finishes import with_eps, with_x0
from ldm_jax.diffusion.process import Path, over
from ldm_jax.types import Denoiser

# (x, t) -> log p(y | x) for each sample, up to a constant
LogLikelihood = Callable[[Float[Array, "b *space c"], Float[Array, " b"]], Float[Array, " b"]]


def by_classifier(
    denoise: Denoiser, path: Path, log_p: LogLikelihood, scale: ArrayLike
) -> Denoiser:
    """Classifier guidance (Dhariwal & Nichol 2021, Algorithm 2): `log_p` reads the noisy x_t and t.

    `scale` is a scalar or one value a sample, [b], and may be traced; 0 is the model itself, to the bit.
    """

    def guided(x_t, t, cond):
        out = denoise(x_t, t, cond)
        grad = jax.grad(lambda x: log_p(x, t).sum())(x_t)
        s = over(jnp.asarray(scale, grad.dtype), x_t)
        return with_eps(path, x_t, t, out, out.eps - s * over(path.sigma(t), x_t) * grad)

    return guided


def by_estimate(
    denoise: Denoiser,
    path: Path,
    log_p: LogLikelihood,
    scale: ArrayLike,
    through: bool = True,
) -> Denoiser:
    """Guidance by a function of clean data, read from the estimate of x0: CLIP, or any loss (Bansal et al. 2023).

    `log_p` gets x0 and t, where t tells it how coarse the estimate still is. For latents it decodes them itself. For
    CLIP it is a factor times the cosine between the embeddings of picture and text. The gradient goes `through` the
    denoiser, which costs about two more calls and the memory of training; or else by x0 alone, with

        d x0 / d x_t = alpha / (alpha^2 + sigma^2),

    which is right for data that are independent and of unit variance (Song et al. 2023, PiGDM).
    Scales as in `by_classifier`.
    """

    def guided(x_t, t, cond):
        if through:

            def read(x):
                out = denoise(x, t, cond)
                return log_p(out.x0, t).sum(), out

            grad, out = jax.grad(read, has_aux=True)(x_t)
            s = over(jnp.asarray(scale, grad.dtype), x_t)
            return with_eps(path, x_t, t, out, out.eps - s * over(path.sigma(t), x_t) * grad)
        out = denoise(x_t, t, cond)
        grad = jax.grad(lambda x0: log_p(x0, t).sum())(out.x0)
        variance = path.sigma(t) ** 2 / (path.alpha(t) ** 2 + path.sigma(t) ** 2)
        s = over(jnp.asarray(scale, grad.dtype), x_t)
        return with_x0(path, x_t, t, out, out.x0 + s * over(variance, x_t) * grad)

    return guided
