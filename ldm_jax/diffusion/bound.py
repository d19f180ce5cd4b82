"""The variational bound on -log p(x) in bits per dimension, as an evaluation of a trained model.

For the chain of noise levels l_0 (noisy) > l_1 > ... > l_n (clean data) of a sampling grid (Ho et
al. 2020, eq. 5),

    -log p(x) <= KL(q(x_{l_0} | x) || p(x_{l_0}))                                     prior
               + sum_{p = l_0 ... l_{n-2}} E KL(q(x_q | x_p, x) || p(x_q | x_p))      transitions
               + E -log p(x | x_{l_{n-1}})                                            decoder

where q is the level after p, and p(x_q | x_p) is the posterior q(x_q | x_p, x0) with the network's
x0. All are Gaussian. On `grid(path, path.steps, "linspace")` of a ddpm path this is the bound of
the paper; with "small" variance a transition is (SNR_q - SNR_p) / 2 ||x0 - x0_hat||^2 (Kingma et
al. 2021, eq. 13).
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.stats import norm
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key

from ldm_jax.diffusion.process import Data, Point, over, posterior, transition
from ldm_jax.types import Cond, Denoiser

Elements = Float[Array, "b *space c"]
# (x, mean, std) -> -log p(x) of each value, in nats
Decoder = Callable[[Elements, Elements, Array], Elements]


class Bound(NamedTuple):
    """Bits per dimension of each sample; total = prior + sum of transitions + decoder."""

    total: Float[Array, " b"]
    prior: Float[Array, " b"]
    transitions: Float[Array, "steps b"]  # from the noisy end
    decoder: Float[Array, " b"]


def gaussian_kl(mean1: ArrayLike, var1: ArrayLike, mean2: ArrayLike, var2: ArrayLike) -> Array:
    """KL(N(mean1, var1) || N(mean2, var2)) in nats, elementwise."""
    ratio = jnp.asarray(var1) / var2
    return (ratio - 1 - jnp.log(ratio) + (mean1 - mean2) ** 2 / var2) / 2


def continuous() -> Decoder:
    """A normal density: for latents, and other data that are real numbers."""
    return lambda x, mean, std: -norm.logpdf(x, mean, std)


def discretised(levels: int = 256) -> Decoder:
    """The normal's mass in the bin of a value (Ho et al. 2020, eq. 13).

    For data of `levels` equidistant values in [-1, 1]. The outermost bins extend to infinity, so
    the masses of all values sum to one.
    """
    half = 1.0 / (levels - 1)

    def nll(x, mean, std):
        # On the side of the mean where both distribution functions are small, lest 1 - 1 be all
        # that is left.
        side = jnp.where(x > mean, -1.0, 1.0)
        centre, width = side * (x - mean) / std, half / std
        upper = jnp.where(side * x > 1 - half, jnp.inf, centre + width)
        lower = jnp.where(side * x < half - 1, -jnp.inf, centre - width)
        log_upper, log_lower = norm.logcdf(upper), norm.logcdf(lower)
        return -(log_upper + jnp.log(-jnp.expm1(log_lower - log_upper)))

    return nll


def bits_per_dim(
    denoise: Denoiser,
    points: Point,
    x0: Data,
    rng: Key[Array, ""],
    cond: Cond,
    decoder: Decoder | None = None,
    variance: Literal["small", "large"] = "small",
) -> Bound:
    """The bound above on a grid that ends in clean data, with one draw of noise at every level.

    The prior is N(0, alpha^2 + sigma^2) at the first level, from which `samplers.initial_noise`
    draws. The decoder (default: `discretised()`, 8 bits) has the estimated x0 as mean and the
    standard deviation sigma / alpha of the last noisy level. `variance` as in `solvers.ddpm`. One
    call of the network a level, in a scan.

    Raises:
      ValueError: an unknown variance, or a grid of fewer than two steps.
    """
    if variance not in ("small", "large"):
        raise ValueError(f"there is no {variance=}; the choices are 'small' and 'large'")
    if len(points.t) < 3:
        raise ValueError(f"the bound needs a grid of at least two steps, not {len(points.t) - 1}")
    decoder = decoder or discretised()
    bits = 1 / (jnp.log(2.0) * x0[0].size)

    def total(nats):
        return nats.reshape(len(nats), -1).sum(-1) * bits

    def estimate(p, i):
        eps = jax.random.normal(jax.random.fold_in(rng, i), x0.shape, x0.dtype)
        x_p = over(p.alpha, x0) * x0 + over(p.sigma, x0) * eps
        return denoise(x_p, jnp.broadcast_to(p.t, x0.shape[:1]), cond).x0

    def body(_, inputs):
        i, p, q = inputs
        of_x0, _, var = posterior(p, q)  # both means contain the same share of x_p
        model_var = transition(p, q)[1] if variance == "large" else var
        return None, total(gaussian_kl(of_x0 * x0, var, of_x0 * estimate(p, i), model_var))

    n = len(points.t) - 1
    first, last = (Point(*(a[i] for a in points)) for i in (0, n - 1))
    p, q = Point(*(a[: n - 1] for a in points)), Point(*(a[1:n] for a in points))
    _, transitions = lax.scan(body, None, (jnp.arange(n - 1), p, q))
    prior = total(
        gaussian_kl(first.alpha * x0, first.sigma**2, 0.0, first.alpha**2 + first.sigma**2)
    )
    decoded = total(decoder(x0, estimate(last, n - 1), last.sigma / last.alpha))
    return Bound(prior + transitions.sum(0) + decoded, prior, transitions, decoded)
