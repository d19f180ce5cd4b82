"""Solvers that add noise before they step down: Karras et al. 2022, Algorithm 2, and Restart.

`churn` is the paper's S_churn / N, the share by which a step raises sigma / alpha first, cut at sqrt(2) - 1; it does so
where s_tmin <= sigma / alpha <= s_tmax, never beyond the path's noisy end, with noise `s_noise` times as wide as it
should be. All of them are scalars or one value a sample, and may be traced; churn = 0 is the deterministic solver.
"""

import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from ldm_jax.diffusion.process import Path, Point, level, log_ratio, over, transition
from ldm_jax.diffusion.samplers import Solver, noise
from ldm_jax.diffusion.solvers.basic import euler, heun

MOST = 2**0.5 - 1  # Karras et al. 2022, Algorithm 2, line 4


def euler_churn(
    path: Path,
    churn: ArrayLike = 0.2,
    s_tmin: ArrayLike = 0.0,
    s_tmax: ArrayLike = jnp.inf,
    s_noise: ArrayLike = 1.0,
    late: bool = False,
) -> Solver:
    """Karras et al. 2022, Algorithm 2 with Euler's method. Order 1, one call a step.

    diffusers' schedulers (EulerDiscrete, EDMEuler) deviate: their network has been asked at p, before the noise, and
    its answer is used at the raised level. For a network that predicts eps, `late=True` does as they do.
    """
    of = churn, s_tmin, s_tmax, s_noise
    if not late:
        return _churned(euler(), path, *of)

    def step(denoise, x, p, q, memory, rng):
        x0, eps = denoise(x, p.t)
        gamma = _gamma(p, churn, s_tmin, s_tmax)
        ratio = q.alpha * p.sigma / jnp.where(gamma > 0, p.alpha, 1.0)
        wide = ratio * jnp.sqrt(gamma * (2 + gamma)) * jnp.asarray(s_noise, x.dtype)
        x_q = over(q.alpha, x) * x0 + over(q.sigma - gamma * ratio, x) * eps
        return x_q + over(wide, x) * noise(rng, x.shape, x.dtype), memory, x0

    return Solver(lambda x: (), step)


def heun_churn(
    path: Path,
    churn: ArrayLike = 0.2,
    s_tmin: ArrayLike = 0.0,
    s_tmax: ArrayLike = jnp.inf,
    s_noise: ArrayLike = 1.0,
) -> Solver:
    """Karras et al. 2022, Algorithm 2. Order 2; two calls a step, one in a step to clean data."""
    return _churned(heun(), path, churn, s_tmin, s_tmax, s_noise)


def _gamma(p, churn, s_tmin, s_tmax):
    ratio = p.sigma / jnp.where(p.alpha > 0, p.alpha, 1.0)
    inside = (p.alpha > 0) & (ratio >= s_tmin) & (ratio <= s_tmax)
    return jnp.where(inside, jnp.clip(jnp.asarray(churn, ratio.dtype), 0.0, MOST), 0.0)


def _churned(solver, path, churn, s_tmin, s_tmax, s_noise):
    """The solver, from a noisier level than p."""

    def step(denoise, x, p, q, memory, rng):
        gamma = _gamma(p, churn, s_tmin, s_tmax)
        lam = jnp.where(gamma > 0, log_ratio(p) - jnp.log1p(gamma), 0.0)
        hat = level(path, lam)
        x = jnp.where(over(gamma > 0, x), _raised(x, p, hat, s_noise, rng), x)
        hat = Point(*(jnp.where(gamma > 0, a, b) for a, b in zip(hat, p, strict=True)))
        return solver.step(denoise, x, hat, q, memory, rng)

    return Solver(solver.init, step)


def _raised(x, p, hat, s_noise, rng):
    """x at p, noised to the noisier level hat."""
    of_x, variance = transition(hat, p)
    wide = jnp.sqrt(jnp.maximum(variance, 0.0)) * jnp.asarray(s_noise, x.dtype)
    return over(of_x, x) * x + over(wide, x) * noise(rng, x.shape, x.dtype)


def restart(down: str = "heun") -> Solver:
    """Restart sampling (Xu et al. 2023, Algorithm 2): a grid that goes back up, see `grids.grid(restarts=...)`.

    A step to a noisier level adds the noise in between, asks no network and keeps the last estimate of x0; one to a
    cleaner level is Heun's or Euler's. On a grid that only falls this is that solver.

    Raises:
      ValueError: an unknown solver for the way down.
    """
    if down not in ("heun", "euler"):
        raise ValueError(f"there is no {down=} for restart; the choices are 'heun' and 'euler'")
    solver = heun() if down == "heun" else euler()

    def step(denoise, x, p, q, memory, rng):
        up = p.sigma * q.alpha < q.sigma * p.alpha

        def fall():
            y, _, x0 = solver.step(denoise, x, p, q, (), rng)
            return jnp.where(over(up, x), rise()[0], y), jnp.where(over(up, x), memory, x0)

        def rise():
            return _raised(x, p, q, 1.0, rng), memory

        y, x0 = lax.cond(jnp.all(up), rise, fall)
        return y, x0, x0

    return Solver(jnp.zeros_like, step)
