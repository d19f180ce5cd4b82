"""Distributions whose denoiser is known in closed form, for every path: what the solvers are measured against.

And the paths and solvers, by name.
"""

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import norm

from ldm_jax.diffusion import paths, samplers, solvers
from ldm_jax.diffusion.process import over
from ldm_jax.types import Cond, Prediction

KEY = jax.random.key(0)
NO_COND = Cond()
# Correlated Gaussian data, for `gaussian`.
MEAN, COV = np.array([0.5, -0.3], np.float32), np.array([[0.6, 0.25], [0.25, 0.3]], np.float32)

_PATHS = {
    "linear": paths.ddpm("linear", 1e-4, 0.02),
    "scaled_linear": paths.ddpm("scaled_linear"),
    "squared_cosine": paths.ddpm("squared_cosine"),
    "zero_snr": paths.ddpm("scaled_linear", zero_terminal_snr=True),
    "cosine": paths.cosine(),
    "rectified_flow": paths.rectified_flow(),
    "edm": paths.edm(),
}
# Compiled, since a test calls them outside of any jit.
PATHS = {
    name: p._replace(alpha=jax.jit(p.alpha), sigma=jax.jit(p.sigma), time_of=jax.jit(p.time_of))
    for name, p in _PATHS.items()
}
SOLVERS = {
    "ddpm": solvers.ddpm(),
    "ddpm_large": solvers.ddpm("large"),
    "ddim": solvers.ddim(),
    "ddim_eta": solvers.ddim(0.7),
    "euler": solvers.euler(),
    "heun": solvers.heun(),
    "dpmpp_2m": solvers.dpmpp_2m(),
}


def _eps(path, t, x_t, x0):
    """From x_t = alpha x0 + sigma eps; 0 / 0 at sigma = 0, where no solver asks."""
    return (x_t - over(path.alpha(t), x_t) * x0) / over(path.sigma(t), x_t)


def gaussian(path, mean, cov):
    """Channels ~ N(mean, cov): E[x0 | x_t] = mean + alpha cov (alpha^2 cov + sigma^2)^-1 (x_t - alpha mean)."""
    mean, cov = jnp.asarray(mean), jnp.asarray(cov)
    values, vectors = jnp.linalg.eigh(cov)

    def denoise(x_t, t, cond):
        alpha, sigma = over(path.alpha(t), x_t), over(path.sigma(t), x_t)
        y = (x_t - alpha * mean) @ vectors
        variance = alpha**2 * values + sigma**2
        x0 = mean + (alpha * values / variance * y) @ vectors.T
        return Prediction(x0, (sigma / variance * y) @ vectors.T)

    return denoise


class Mixture:
    """Every value ~ sum_k w_k N(m_k, s_k^2), independently."""

    def __init__(self, weights, means, stds):
        self.w, self.m, self.s = (np.asarray(a, float) for a in (weights, means, stds))

    def denoiser(self, path):
        def denoise(x_t, t, cond):
            alpha, sigma = (over(f(t), x_t)[..., None] for f in (path.alpha, path.sigma))
            m, var, z = alpha * self.m, (alpha * self.s) ** 2 + sigma**2, x_t[..., None]
            logits = jnp.log(self.w) - (z - m) ** 2 / (2 * var) - jnp.log(var) / 2
            share = jnp.exp(logits - logits.max(-1, keepdims=True))
            share /= share.sum(-1, keepdims=True)
            x0 = (share * (self.m + alpha * self.s**2 / var * (z - m))).sum(-1)
            return Prediction(x0, _eps(path, t, x_t, x0))

        return denoise

    def quantiles(self, u, alpha, sigma):
        """The inverse distribution function of x_t at u, by bisection. The exact flow of the ODE keeps u."""
        m, s = alpha * self.m, np.sqrt((alpha * self.s) ** 2 + sigma**2)
        lo, hi = (np.full(u.shape, end) for end in ((m - 9 * s).min(), (m + 9 * s).max()))
        for _ in range(60):
            x = (lo + hi) / 2
            below = norm.cdf(x[:, None], m, s) @ self.w < u
            lo, hi = np.where(below, x, lo), np.where(below, hi, x)
        return x


def run(denoise, solver, points, x_T, key=KEY, **kwargs):
    walk = jax.jit(
        lambda points, x, key: samplers.sample(denoise, solver, points, x, key, NO_COND, **kwargs)
    )
    return walk(points, x_T, key)


def run_all(denoise, names, points, x_T):
    """{solver: x}, compiled once."""

    def walk(points, x):
        return {s: samplers.sample(denoise, SOLVERS[s], points, x, KEY, NO_COND)[0] for s in names}

    return jax.jit(walk)(points, x_T)
