"""How much each noise level counts in a diffusion loss.

A weighting is stated as the weight w of ||x0 - x0_hat||^2, and turned into the weight of the loss
||F - F_hat||^2 that is minimised: an error dF of the network is an error -(sigma / D) dF of x0
(`process.determinant`), so

    weight = w (sigma / D)^2

for every target: with SNR = alpha^2 / sigma^2 and a variance-preserving path w, w / SNR, w / (SNR +
1) for x0, eps, v, as in Hang et al. 2023, section 3.4. Each weighting is a function (path, target,
t) -> [b], for t > 0.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from ldm_jax.diffusion.process import Path, Target, determinant

Weighting = Callable[[Path, Target, Float[Array, " b"]], Float[Array, " b"]]


def uniform() -> Weighting:
    """1: the plain loss of the target (Ho et al. 2020, eq. 14, for eps)."""
    return lambda path, target, t: jnp.ones_like(t)


def min_snr(gamma: float = 5.0) -> Weighting:
    """w = min(SNR, gamma) (Hang et al. 2023, eq. 8)."""
    _positive("gamma", gamma)

    def weight(path, target, t):
        alpha2, sigma2 = path.alpha(t) ** 2, path.sigma(t) ** 2
        return jnp.minimum(alpha2, gamma * sigma2) / determinant(path, target, t) ** 2

    return weight


def soft_min_snr(gamma: float = 4.0) -> Weighting:
    """w = SNR gamma / (SNR + gamma) (Crowson et al. 2024): min-SNR without the corner."""
    _positive("gamma", gamma)

    def weight(path, target, t):
        alpha2, sigma2 = path.alpha(t) ** 2, path.sigma(t) ** 2
        share = gamma * alpha2 / (alpha2 + gamma * sigma2)
        return share * sigma2 / determinant(path, target, t) ** 2

    return weight


def edm(sigma_data: float = 0.5) -> Weighting:
    """w = SNR + 1 / sigma_data^2 (Karras et al. 2022, Table 1); the plain loss of the target edm."""
    _positive("sigma_data", sigma_data)

    def weight(path, target, t):
        alpha2, sigma2 = path.alpha(t) ** 2, path.sigma(t) ** 2
        return (alpha2 + sigma2 / sigma_data**2) / determinant(path, target, t) ** 2

    return weight


def _positive(name: str, value: float) -> None:
    if value <= 0:
        raise ValueError(f"{name} = {value} must be positive")
