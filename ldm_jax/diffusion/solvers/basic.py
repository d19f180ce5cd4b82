"""The basic solvers: of first order, and Heun's method.

Deterministic solvers integrate the probability-flow ODE in the form

    dx = x0(x, t) d alpha + eps(x, t) d sigma

in which all paths look alike: no solver divides by alpha_p (0 at the noisy end of flows) or by
sigma_q (0 at clean data), so the first and the last step are no special cases. A step takes and
returns states in the units of the path.
"""

from typing import Literal

import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from ldm_jax.diffusion import learned
from ldm_jax.diffusion.process import over, posterior, snr_ratio, transition
from ldm_jax.diffusion.samplers import Solver, noise


def _none(x):
    return ()


def ddpm(variance: Literal["small", "large", "learned"] = "small") -> Solver:
    """Ancestral sampling (Ho et al. 2020, Algorithm 2).

    Draws from q(x_q | x_p, x0) with the estimated x0. `variance` is that of this posterior
    ("small"), or of the noising step from q to p ("large"; section 3.2 there), or what the network
    says lies between them ("learned"; Nichol & Dhariwal 2021). One call of the network a step.

    Raises:
      ValueError: an unknown variance; when it walks, a network that predicts none.
    """
    if variance not in ("small", "large", "learned"):
        raise ValueError(f"there is no {variance=}; the choices are 'small', 'large' and 'learned'")

    def step(denoise, x, p, q, memory, rng):
        prediction = denoise(x, p.t)
        x0 = prediction.x0
        of_x0, of_x, var = posterior(p, q)
        if variance == "large":
            var = transition(p, q)[1]
        var = over(var, x)
        if variance == "learned":
            var = learned.variance(prediction.spread, var, over(transition(p, q)[1], x))
        var = jnp.where(over(q.sigma, x) > 0, var, 0.0)  # clean data get no noise
        z = noise(rng, x.shape, x.dtype)
        return over(of_x0, x) * x0 + over(of_x, x) * x + jnp.sqrt(var) * z, memory, x0

    return Solver(_none, step)


def ddim(eta: ArrayLike = 0.0) -> Solver:
    """Song et al. 2021, eq. 12 with the noise of eq. 16, on any path.

    eta = 0 is deterministic, 1 is ddpm("small"). `eta` in [0, 1] is a scalar or one value a sample,
    [b], and may be traced. Order 1 (eta = 0), one call a step.
    """

    def step(denoise, x, p, q, memory, rng):
        x0, eps = denoise(x, p.t)
        rho = snr_ratio(p, q)
        up = jnp.asarray(eta, x.dtype) * q.sigma * jnp.sqrt((1 - rho) * (1 + rho))
        down = jnp.sqrt((q.sigma - up) * (q.sigma + up))
        z = noise(rng, x.shape, x.dtype)
        return over(q.alpha, x) * x0 + over(down, x) * eps + over(up, x) * z, memory, x0

    return Solver(_none, step)


def euler() -> Solver:
    """Euler's method; the first stage of Karras et al. 2022, Algorithm 1. Order 1, one call a step.

    The ODE is straight in alpha and sigma where x0 and eps are constant, so this is ddim(0) on
    every path, without drawing noise.
    """

    def step(denoise, x, p, q, memory, rng):
        x0, eps = denoise(x, p.t)
        return x + over(q.alpha - p.alpha, x) * x0 + over(q.sigma - p.sigma, x) * eps, memory, x0

    return Solver(_none, step)


def heun(ratio: bool = False) -> Solver:
    """Karras et al. 2022, Algorithm 1, on any path: Euler, then the trapezoid.

    Order 2; two calls a step, one in a step to clean data. On alpha = 1 these are the paper's
    steps, on a rectified flow Heun's method in t. With `ratio` they are the paper's steps for x / alpha
    and sigma / alpha on every path, as in k-diffusion and diffusers; from pure noise, where that is
    infinite, the step is the other one.
    """

    def step(denoise, x, p, q, memory, rng):
        x0, eps = denoise(x, p.t)
        d_alpha, d_sigma = over(q.alpha - p.alpha, x), over(q.sigma - p.sigma, x)
        guess = x + d_alpha * x0 + d_sigma * eps

        def corrected():
            again = denoise(guess, q.t)
            better = x + d_alpha * (x0 + again.x0) / 2 + d_sigma * (eps + again.eps) / 2
            if ratio:
                span = q.sigma - q.alpha * p.sigma / jnp.where(p.alpha > 0, p.alpha, 1.0)
                scaled = guess + over(span, x) * (again.eps - eps) / 2
                better = jnp.where(over(p.alpha, x) > 0, scaled, better)
            return jnp.where(over(q.sigma, x) > 0, better, guess)

        return lax.cond(jnp.any(q.sigma > 0), corrected, lambda: guess), memory, x0

    return Solver(_none, step)
