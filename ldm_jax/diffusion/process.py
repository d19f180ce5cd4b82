"""The diffusion process: how data becomes noise, and how to read what a network predicts.

A path gives every time t in [0, 1] a noise level, and the noisy data are

    x_t = alpha(t) x0 + sigma(t) eps,    eps ~ N(0, I),        t = 0: data, t = 1: noise

A target is what the network predicts, one row (a, b) of F = a x0 + b eps. With x_t that is a 2x2
linear system,

    | alpha  sigma | |x0 |   |x_t|               x0  = (b x_t - sigma F) / D
    |   a      b   | |eps| = | F |      so   eps = (alpha F - a x_t) / D,    D = alpha b - sigma a

which `make_denoiser` solves once for all targets: solvers, guidance and bounds see only x0 and eps.
Between two noise levels p and q, where q is the cleaner one, the Markov chain of Ho et al. 2020 is
in terms of rho = (alpha_p sigma_q) / (alpha_q sigma_p), the ratio of their alpha / sigma:

    q(x_p | x_q)     = N(alpha_p / alpha_q x_q,  sigma_p^2 (1 - rho^2) I)
    q(x_q | x_p, x0) = N(alpha_q (1 - rho^2) x0 + rho sigma_q / sigma_p x_p, sigma_q^2 (1 - rho^2) I)

This form divides neither by alpha_p nor by sigma_q, so it holds from pure noise to clean data on
every path.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ldm_jax.types import Cond, Denoiser, Network, Prediction

NO_MESH = jax.sharding.AbstractMesh((), ())
Times = Float[Array, " b"]
Data = Float[Array, "b *space c"]


class Path(NamedTuple):
    """How data becomes noise, for t in [0, t_max]; all functions are elementwise. Made by `paths`."""

    alpha: Callable[[Array], Array]
    sigma: Callable[[Array], Array]
    time_of: Callable[[Array], Array]  # lambda = log(alpha / sigma), half the log-SNR, -> t
    t_max: float = 1.0
    steps: int | None = None  # of a table, whose entry i is at t = i / (steps - 1)
    c_in: Callable[[Array], Array] = jnp.ones_like  # the network reads c_in x_t


class Target(NamedTuple):
    """What a network predicts, F = a x0 + b eps, and how its inputs are scaled. Made by `targets`."""

    row: Callable[[Path, Array], tuple[Array, Array]]  # (path, t) -> (a, b)
    c_in: Callable[[Path, Array], Array]  # the network reads c_in x_t ...
    c_time: Callable[[Path, Array], Array]  # ... and c_time instead of t


class Point(NamedTuple):
    """A noise level: scalars, or one value a sample, [b]; with a leading axis a grid of levels."""

    t: Array
    alpha: Array
    sigma: Array


def log_ratio(p: Point) -> Array:
    """lambda = log(alpha / sigma), half the log-SNR: -inf for pure noise, inf for clean data."""
    return jnp.log(p.alpha) - jnp.log(p.sigma)


def level(path: Path, lam: Array) -> Point:
    """The noise level of a path at a finite lambda, within the path's range."""
    t = path.time_of(lam)
    return Point(t, path.alpha(t), path.sigma(t))


def over(coefficient: Array, x: Array) -> Array:
    """A scalar or one value a sample, shaped so that it multiplies x: [b] -> [b, 1, ..., 1]."""
    return (
        coefficient.reshape(coefficient.shape + (1,) * (x.ndim - 1))
        if coefficient.ndim
        else coefficient
    )


@contextlib.contextmanager
def concrete() -> Iterator[None]:
    """Within, what is computed of numbers is a number, also while a caller is being traced, for whatever devices."""
    with jax.sharding.use_abstract_mesh(NO_MESH), jax.ensure_compile_time_eval():
        yield


def determinant(path: Path, target: Target, t: Array) -> Array:
    """D = alpha b - sigma a; an error dF of the network is an error -(sigma / D) dF of x0."""
    a, b = target.row(path, t)
    return path.alpha(t) * b - path.sigma(t) * a


def check(path: Path, target: Target) -> None:
    """Raises ValueError where the network's output cannot be read at the noisy end of the path."""
    with concrete():
        singular = bool(determinant(path, target, jnp.full((1,), path.t_max))[0] == 0)
    if singular:
        raise ValueError(
            f"this target (eps) divides by alpha, which is 0 at t_max = {path.t_max} of this path; "
            "use the target v, x0, flow or edm, or a path that stops earlier "
            "(t_max = 0.999, or zero_terminal_snr = False)"
        )


def make_denoiser(network: Network, path: Path, target: Target) -> Denoiser:
    """The function (x_t, t, cond) -> (x0, eps) that a network's output implies; the 2x2 system above.

    Coefficients and result have the precision of t (float32), whatever the network computes in.

    Raises:
      ValueError: an eps target on a path whose noisy end is pure noise (alpha = 0).
    """
    check(path, target)

    def denoise(x_t: Data, t: Times, cond: Cond) -> Prediction:
        f = network(over(target.c_in(path, t), x_t) * x_t, target.c_time(path, t), cond)
        f, spread = parted(f.astype(t.dtype), x_t)
        return prediction(path, target, x_t, f, t).replace(spread=spread)

    return denoise


def prediction(path: Path, target: Target, x_t: Data, f: Data, t: Times) -> Prediction:
    """x0 and eps of F: the 2x2 system above."""
    alpha, sigma = over(path.alpha(t), x_t), over(path.sigma(t), x_t)
    a, b = (over(c, x_t) for c in target.row(path, t))
    d = alpha * b - sigma * a
    return Prediction(x0=(b * x_t - sigma * f) / d, eps=(alpha * f - a * x_t) / d)


def parted(output: Array, x_t: Data) -> tuple[Data, Data | None]:
    """F, and where the network has twice the channels of x_t the rest, which tells a variance (`learned`).

    Raises:
      ValueError: another number of channels.
    """
    c = x_t.shape[-1]
    if output.shape[-1] not in (c, 2 * c):
        raise ValueError(
            f"the network gives {output.shape[-1]} channels for data of {c}; expected as many, or twice as many with "
            "a learned variance"
        )
    return output[..., :c], output[..., c:] if output.shape[-1] > c else None


def add_noise(path: Path, x0: Data, eps: Data, t: Times) -> Data:
    """x_t = alpha x0 + sigma eps."""
    return over(path.alpha(t), x0) * x0 + over(path.sigma(t), x0) * eps


def target_of(path: Path, target: Target, x0: Data, eps: Data, t: Times) -> Data:
    """What a perfect network would output: F = a x0 + b eps."""
    a, b = target.row(path, t)
    return over(a, x0) * x0 + over(b, x0) * eps


def snr_ratio(p: Point, q: Point) -> Array:
    """rho, alpha / sigma at p over that at the cleaner q; 0 if p is pure noise or q clean data."""
    return (p.alpha * q.sigma) / (q.alpha * p.sigma)


def transition(p: Point, q: Point) -> tuple[Array, Array]:
    """q(x_p | x_q), the noising step: the factor of x_q, the variance (Ho et al. 2020, eq. 2)."""
    rho = snr_ratio(p, q)
    return p.alpha / q.alpha, p.sigma**2 * (1 - rho) * (1 + rho)


def posterior(p: Point, q: Point) -> tuple[Array, Array, Array]:
    """q(x_q | x_p, x0): the factors of x0 and x_p, the variance (Ho et al. 2020, eq. 6-7)."""
    rho = snr_ratio(p, q)
    gain = (1 - rho) * (1 + rho)
    return q.alpha * gain, rho * q.sigma / p.sigma, q.sigma**2 * gain
