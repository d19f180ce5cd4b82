"""How data becomes noise: alpha(t) and sigma(t) for t in [0, 1], 0 data, 1 noise.

| path           | alpha         | sigma                  | source                              |
|----------------|---------------|------------------------|-------------------------------------|
| ddpm           | sqrt(abar)    | sqrt(1 - abar)         | a table, Ho et al. 2020             |
| cosine         | cos(pi t / 2) | sin(pi t / 2)          | Nichol & Dhariwal 2021, offset 0    |
| rectified_flow | 1 - t         | t                      | Liu et al. 2023, Lipman et al. 2023 |
| edm            | 1             | (lo + t (hi - lo))^rho | Karras et al. 2022, eq. 5           |

cosine and rectified_flow end in pure noise, alpha(1) = 0, from which no network can read eps: for
that target let them stop at `t_max` = 0.999. In between, everything goes by lambda = log(alpha /
sigma), half the log-SNR.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion.process import Path

SCHEDULES = ("linear", "scaled_linear", "squared_cosine")
MAX_BETA = 0.999  # Nichol & Dhariwal 2021, section 3.2


def _table(schedule: str, beta_start: float, beta_end: float, steps: int) -> np.ndarray:
    """abar_i = prod_{j <= i} (1 - beta_j), float64 [steps], decreasing."""
    if schedule == "linear":
        betas = np.linspace(beta_start, beta_end, steps)
    elif schedule == "scaled_linear":
        betas = np.linspace(beta_start**0.5, beta_end**0.5, steps) ** 2
    elif schedule == "squared_cosine":
        edges = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - edges[1:] / edges[:-1], MAX_BETA)
    else:
        raise ValueError(f"there is no schedule {schedule!r}; the choices are {list(SCHEDULES)}")
    return np.cumprod(1 - betas)


def ddpm(
    schedule: str = "scaled_linear",
    beta_start: float = 0.00085,
    beta_end: float = 0.012,
    steps: int = 1000,
    zero_terminal_snr: bool = False,
) -> Path:
    """A variance-preserving table of discrete times (Ho et al. 2020).

    Between the entries, lambda is linear in t; t = i / (steps - 1) is the table's entry i exactly.
    Schedules have diffusers' names: "linear" is linear in beta (Ho et al.: 1e-4 to 0.02),
    "scaled_linear" is linear in sqrt(beta) and is what CompVis' code calls "linear" (the defaults
    are Stable Diffusion's), "squared_cosine" is Nichol & Dhariwal 2021, eq. 17 (it ignores the
    betas). `zero_terminal_snr` shifts and scales sqrt(abar) so that the last entry is pure noise
    (Lin et al. 2023, alg. 1).

    Raises:
      ValueError: an unknown schedule, betas out of order, fewer than three steps.
    """
    if steps < 3:
        raise ValueError(f"a table needs at least 3 steps, not {steps}")
    if not 0 < beta_start <= beta_end < 1:
        raise ValueError(f"betas must satisfy 0 < {beta_start=} <= {beta_end=} < 1")
    alphas = np.sqrt(_table(schedule, beta_start, beta_end, steps))
    sigmas = np.sqrt(1 - alphas**2)
    last = steps - 2  # the last interval, at whose end alpha is 0 when rescaled
    if zero_terminal_snr:
        alphas = (alphas - alphas[-1]) * alphas[0] / (alphas[0] - alphas[-1])
        sigmas = np.sqrt(1 - alphas**2)
        alphas[-1] = alphas[-2] / 2  # any finite entry: the last interval does not use it
    log_ratios = np.log(alphas) - np.log(sigmas)

    def ratio(t):
        """alpha / sigma"""
        table = jnp.asarray(log_ratios, t.dtype)
        i = jnp.clip(jnp.floor(t * (steps - 1.0)).astype(jnp.int32), 0, last)
        w = t * (steps - 1.0) - i
        smooth = jnp.exp((1 - w) * table[i] + w * table[i + 1])
        if not zero_terminal_snr:
            return smooth
        # lambda falls to -inf within the last interval: there the ratio itself is linear.
        return jnp.where(i == last, (1 - w) * jnp.exp(table[last]), smooth)

    def time_of(lam):
        table = jnp.asarray(log_ratios, lam.dtype)
        t = jnp.interp(-lam, -table, jnp.arange(steps, dtype=lam.dtype) / (steps - 1.0))
        if zero_terminal_snr:
            w = -jnp.expm1(jnp.minimum(lam - table[last], 0.0))
            t = jnp.where(lam < table[last], (last + w) / (steps - 1.0), t)
        return t

    def alpha(t):
        r = ratio(t)
        return r / jnp.sqrt(1 + r * r)

    return Path(alpha, lambda t: 1 / jnp.sqrt(1 + ratio(t) ** 2), time_of, steps=steps)


def cosine(t_max: float = 1.0) -> Path:
    """alpha = cos(pi t / 2), variance-preserving (Salimans & Ho 2022)."""
    _check_t_max(t_max)
    half_pi = float(np.pi / 2)
    return Path(
        alpha=lambda t: jnp.sin(
            half_pi * (1 - t)
        ),  # exactly 0 at t = 1, where the rounded cosine is negative
        sigma=lambda t: jnp.sin(half_pi * t),
        time_of=lambda lam: jnp.clip(jnp.arctan(jnp.exp(-lam)) / half_pi, 0.0, t_max),
        t_max=t_max,
    )


def rectified_flow(t_max: float = 1.0) -> Path:
    """The straight path alpha = 1 - t, sigma = t (Liu et al. 2023; Esser et al. 2024)."""
    _check_t_max(t_max)
    return Path(
        alpha=lambda t: 1 - t,
        sigma=lambda t: t,
        time_of=lambda lam: jnp.clip(jax.nn.sigmoid(-lam), 0.0, t_max),
        t_max=t_max,
    )


def edm(sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Path:
    """Variance exploding, alpha = 1: uniform times are the levels of Karras et al. 2022, eq. 5.

    With the target edm the network reads x_t scaled by 1 / sqrt(sigma^2 + sigma_data^2); with
    others, sigma_data = 1.
    """
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"noise levels must satisfy 0 < {sigma_min=} < {sigma_max=}")
    if rho < 1:
        raise ValueError(f"{rho=} must be at least 1; Karras et al. use 7")
    lo, hi = sigma_min ** (1 / rho), sigma_max ** (1 / rho)

    def sigma(t):
        return (lo + t * (hi - lo)) ** rho

    return Path(
        alpha=jnp.ones_like,
        sigma=sigma,
        time_of=lambda lam: jnp.clip((jnp.exp(-lam / rho) - lo) / (hi - lo), 0.0, 1.0),
        c_in=lambda t: 1 / jnp.sqrt(1 + sigma(t) ** 2),
    )


def _check_t_max(t_max: float) -> None:
    if not 0 < t_max <= 1:
        raise ValueError(f"{t_max=} must be in (0, 1]; 1 is pure noise")
