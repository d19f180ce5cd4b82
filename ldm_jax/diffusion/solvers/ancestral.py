"""Ancestral solvers: a deterministic step to a cleaner level than q, and noise back up to q.

Of the noise at q, sigma_q, `down` is left by the deterministic step and `up` is drawn anew, down^2 + up^2 = sigma_q^2:

    up = eta sigma_q sqrt(1 - rho^2),    rho = (sigma_q / alpha_q) / (sigma_p / alpha_p)

eta = 1 draws as much as the Markov chain of Ho et al. 2020 between p and q; 0 draws nothing. In these units, those of
x at q, the formulas of k-diffusion (Crowson 2022), written there for alpha = 1, hold on every path, from pure noise to
clean data. Where noise is drawn, orders are those of the covariance of Gaussian data. `eta`, and `s_noise`, a factor on
what is drawn, are scalars or one value a sample, and may be traced.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array

from ldm_jax.diffusion.process import Data, Path, Point, level, log_ratio, over, snr_ratio
from ldm_jax.diffusion.samplers import Solver, Source, noise


def _none(x):
    return ()


def split(p: Point, q: Point, eta: ArrayLike) -> tuple[Array, Array]:
    """(down, up) of a step from p to q; more than sigma_q is never drawn, whatever eta."""
    rho = snr_ratio(p, q)
    eta = jnp.asarray(eta, rho.dtype)
    kept = jnp.maximum((1 - eta) * (1 + eta) + (eta * rho) ** 2, 0.0)
    up = jnp.minimum(eta * jnp.sqrt((1 - rho) * (1 + rho)), 1.0)
    return q.sigma * jnp.sqrt(kept), q.sigma * up


def _split_flow(p, q, eta):
    """The same where eta is linear in s = sigma / (alpha + sigma), which is a rectified flow's sigma."""
    s_p, s_q = (at.sigma / (at.alpha + at.sigma) for at in (p, q))
    step = jnp.asarray(eta, s_q.dtype) * (1 - s_q / s_p)  # s falls to (1 - step) s_q
    kept = (1 - step) * q.alpha / (q.alpha + step * q.sigma)
    gone = step * (q.alpha + q.sigma) / (q.alpha + step * q.sigma)  # 1 - kept, which would cancel
    return q.sigma * kept, q.sigma * jnp.sqrt(gone * (1 + kept))


def euler_ancestral(eta: ArrayLike = 1.0, s_noise: ArrayLike = 1.0, by: str = "ratio") -> Solver:
    """Euler ancestral (Crowson 2022): with s_noise = 1 this is `ddim(eta)` on every path.

    `by="flow"` measures eta in the sigma of a rectified flow, as the samplers for flows of ComfyUI and diffusers
    (LTXEulerAncestralRFScheduler) do; on a flow it then draws more. Order 1, one call a step.

    Raises:
      ValueError: an unknown `by`.
    """
    if by not in ("ratio", "flow"):
        raise ValueError(f"there is no {by=}; the choices are 'ratio' and 'flow'")

    def step(denoise, x, p, q, memory, rng):
        x0, eps = denoise(x, p.t)
        down, up = (split if by == "ratio" else _split_flow)(p, q, eta)
        x_q = over(q.alpha, x) * x0 + over(down, x) * eps
        return x_q + _drawn(noise(rng, x.shape, x.dtype), up, s_noise), memory, x0

    return Solver(_none, step)


def dpm2_ancestral(path: Path, eta: ArrayLike = 1.0, s_noise: ArrayLike = 1.0) -> Solver:
    """DPM-Solver-2 of Karras et al.'s eps with an ancestral step (Crowson 2022, sample_dpm_2_ancestral).

    eps at the geometric middle of p and the level that is stepped down to. Two calls a step, one from pure noise and
    to clean data. Order 2.
    """

    def step(denoise, x, p, q, memory, rng):
        x0, eps = denoise(x, p.t)
        down, up = split(p, q, eta)
        middle, between = _middle(path, p, jnp.log(q.alpha) - jnp.log(down))
        slope = down - q.alpha * p.sigma / jnp.where(between, p.alpha, 1.0)

        def corrected():
            again = denoise(over(middle.alpha, x) * x0 + over(middle.sigma, x) * eps, middle.t).eps
            return jnp.where(over(between, x), over(slope, x) * (again - eps), 0.0)

        better = lax.cond(jnp.any(between), corrected, lambda: jnp.zeros_like(x))
        x_q = over(q.alpha, x) * x0 + over(down, x) * eps + better
        return x_q + _drawn(noise(rng, x.shape, x.dtype), up, s_noise), memory, x0

    return Solver(_none, step)


def dpmpp_2s_ancestral(path: Path, eta: ArrayLike = 1.0, s_noise: ArrayLike = 1.0) -> Solver:
    """DPM-Solver++(2S) (Lu et al. 2022, Algorithm 1 with r = 1/2) with an ancestral step (Crowson 2022).

    x0 in the middle, in lambda, of p and the level that is stepped down to. Two calls a step, one from pure noise and
    to clean data. Order 2.
    """

    def step(denoise, x, p, q, memory, rng):
        x0, eps = denoise(x, p.t)
        down, up = split(p, q, eta)
        middle, between = _middle(path, p, jnp.log(q.alpha) - jnp.log(down))
        guess = over(middle.alpha, x) * x0 + over(middle.sigma, x) * eps
        data = _asked_there(denoise, guess, middle, between, x0)
        x_q = _exponential(x, data, p, q, down)
        return x_q + _drawn(noise(rng, x.shape, x.dtype), up, s_noise), memory, x0

    return Solver(_none, step)


def dpmpp_sde(path: Path, eta: ArrayLike = 1.0, s_noise: ArrayLike = 1.0) -> Solver:
    """DPM-Solver++ for the SDE, two stages with r = 1/2 (Crowson 2022, sample_dpmpp_sde).

    x0 in the middle of p and q, where noise is drawn as well. Both draws are increments of one Brownian motion, which
    runs in sigma / alpha as k-diffusion's: so of each step, two independent normal arrays are needed. In place of a key
    they may be given, [2 b *space c]: those of the first and of the second half. Two calls a step, one from pure
    noise and to clean data. Order 2.

    Raises:
      ValueError: given noise of another shape.
    """

    def step(denoise, x, p, q, memory, rng):
        x0, eps = denoise(x, p.t)
        first, second = two_noises(rng, x)
        middle, between = _middle(path, p, log_ratio(q))
        down, up = split(p, middle, eta)
        guess = over(middle.alpha, x) * x0 + over(down, x) * eps + _drawn(first, up, s_noise)
        data = _asked_there(denoise, guess, middle, between, x0)
        down, up = split(p, q, eta)
        half = jnp.sqrt(snr_ratio(p, q))  # (sigma / alpha) in the middle over that at p
        share = jnp.sqrt(1 / (1 + half)), jnp.sqrt(half / (1 + half))
        z = over(share[0], x) * first + over(share[1], x) * second
        return _exponential(x, data, p, q, down) + _drawn(z, up, s_noise), memory, x0

    return Solver(_none, step)


def two_noises(rng: Source, x: Data) -> tuple[Array, Array]:
    """Two independent normal arrays like x, of a key, of one a sample, or as they are given, [2 b *space c].

    Raises:
      ValueError: given noise of another shape.
    """
    if jnp.issubdtype(rng.dtype, jnp.floating):
        if rng.shape != (2, *x.shape):
            raise ValueError(
                f"this solver draws twice a step: noise of shape {(2, *x.shape)} is needed, not {rng.shape}"
            )
        return rng[0].astype(x.dtype), rng[1].astype(x.dtype)
    fold: Callable[..., Any] = jax.random.fold_in
    fold = jax.vmap(fold, (0, None)) if rng.ndim else fold
    return noise(fold(rng, 0), x.shape, x.dtype), noise(fold(rng, 1), x.shape, x.dtype)


def _drawn(z, up, s_noise):
    return over(up * jnp.asarray(s_noise, z.dtype), z) * z


def _middle(path, p, lam):
    """The level in the middle of p and lambda, and where there is one: neither from pure noise nor to clean data."""
    between = jnp.isfinite(log_ratio(p)) & jnp.isfinite(lam)
    return level(path, jnp.where(between, (log_ratio(p) + lam) / 2, 0.0)), between


def _asked_there(denoise, guess, middle, between, x0):
    def asked():
        return jnp.where(over(between, x0), denoise(guess, middle.t).x0, x0)

    return lax.cond(jnp.any(between), asked, lambda: x0)


def _exponential(x, data, p, q, down):
    """The linear part of the ODE solved exactly for constant x0, down to noise `down` with the signal of q."""
    return over(down / p.sigma, x) * x + over(q.alpha - down * p.alpha / p.sigma, x) * data
