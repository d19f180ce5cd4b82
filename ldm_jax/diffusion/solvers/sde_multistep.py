"""Multistep solvers of the SDE with an exact linear part: DPM-Solver++(2M, 3M) SDE.

With c = 1 + eta and h the step in lambda = log(alpha / sigma), the SDE that interpolates between the probability-flow
ODE (eta = 0) and the reverse-time SDE (eta = 1) has the solution

    x_q = sigma_q / sigma_p e^(-eta h) x + alpha_q int_0^h c e^(-c (h - s)) x0(lambda_p + s) ds
          + sigma_q sqrt(1 - e^(-2 eta h)) z

and a solver replaces x0 by the polynomial through its last estimates. With s = u h, what is left are the moments
`moments` of u^k. The noise is exact and x0 alone is approximated; where e^(-h) = 0, from pure noise or to clean data,
the polynomial is the last estimate itself. Where noise is drawn, orders are those of the covariance of Gaussian data.
`eta` and `s_noise` are scalars or one value a sample, and may be traced.
"""

import math

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array

from ldm_jax.diffusion.process import Data, Point, log_ratio, over
from ldm_jax.diffusion.samplers import Solver, noise

SERIES = 10  # terms, of which the last is below 1e-7 for arguments below 1


def moments(ch: Array, count: int) -> list[Array]:
    """M_k = int_0^1 ch e^(-ch (1 - u)) u^k du for k < count; M_0 = 1 and M_k = 1 for ch = inf."""
    small = jnp.minimum(ch, 1.0)
    large = jnp.maximum(ch, 1.0)
    out = [-jnp.expm1(-ch)]
    by_parts = out[0]
    for k in range(1, count):
        by_parts = 1 - k / large * by_parts
        # Where ch is small, integration by parts cancels: the Taylor series, by Horner's rule.
        series = jnp.zeros_like(ch)
        for j in reversed(range(SERIES)):
            series = math.factorial(k) / math.factorial(k + j + 1) - small * series
        out.append(jnp.where(ch < 1.0, small * series, by_parts))
    return out


def integral(values: list[Data], u: list[Array], known: list[Array], weights: list[Array]) -> Data:
    """The integral of the polynomial through `values` at the nodes u, in Newton's form.

    Nodes are left out from the first on that is not `known`. `weights` are the integrals of 1, u, u^2, ...
    """
    u = [jnp.where(k, at, -float(i)) for i, (k, at) in enumerate(zip(known, u, strict=True))]
    table, basis = list(values), [jnp.ones_like(u[0])]  # divided differences; a polynomial in u
    total, valid = jnp.zeros_like(values[0]), jnp.ones_like(known[0])
    for k in range(len(values)):
        valid = valid & known[k]
        weight = sum(c * w for c, w in zip(basis, weights, strict=False))
        total += over(jnp.where(valid, weight, 0.0), total) * table[0]
        pairs = range(len(table) - 1)
        table = [(table[i] - table[i + 1]) / over(u[i] - u[i + 1 + k], total) for i in pairs]
        raised, lowered = [jnp.zeros_like(u[0]), *basis], [*basis, jnp.zeros_like(u[0])]
        basis = [a - u[k] * b for a, b in zip(raised, lowered, strict=True)]
    return total


def ends(p: Point, q: Point, like: Data) -> tuple[Array, Array, Array]:
    """lambda at p, the step h to q, [b], and where h is finite; h is 1 elsewhere."""
    lam = jnp.broadcast_to(log_ratio(p), like.shape[:1])
    h = jnp.broadcast_to(log_ratio(q), like.shape[:1]) - lam
    finite = jnp.isfinite(h)
    return lam, jnp.where(finite, h, 1.0), finite


def places(history: list, lam: Array, h: Array, finite: Array) -> tuple[list, list]:
    """Where the estimates of a history, latest first, are in units of the step, and whether they are known there."""
    known = [jnp.isfinite(at) & finite for _, at in history[1:]]
    nodes = [
        jnp.where(k, (at - lam) / h, 0.0) for k, (_, at) in zip(known, history[1:], strict=True)
    ]
    first = history[:1]  # the one at p itself; there is none where only the estimate at q counts
    return [jnp.zeros_like(h) for _ in first] + nodes, [
        jnp.ones_like(finite) for _ in first
    ] + known


def linear(x: Data, p: Point, q: Point, h: Array, finite: Array, eta: ArrayLike) -> tuple:
    """e^(-eta h) sigma_q / sigma_p x, and the width of the noise."""
    eta = jnp.asarray(eta, h.dtype)
    # Over an infinite step nothing is left of x, unless eta is 0.
    kept = jnp.where(finite, jnp.exp(-eta * h), jnp.where(eta > 0, 0.0, 1.0))
    gone = jnp.where(finite, -jnp.expm1(-2 * eta * h), jnp.where(eta > 0, 1.0, 0.0))
    return over(q.sigma / p.sigma * kept, x) * x, q.sigma * jnp.sqrt(gone)


def dpmpp_2m_sde(
    eta: ArrayLike = 1.0,
    s_noise: ArrayLike = 1.0,
    kind: str = "midpoint",
) -> Solver:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022, section 5 and appendix; Crowson 2022, sample_dpmpp_2m_sde).

    x0 is linear in lambda: integrated exactly ("heun") or as in DPM-Solver++(2M), at the middle ("midpoint"), which
    with eta = 0 is `dpmpp_2m`. One call a step. Order 2.

    Raises:
      ValueError: an unknown kind.
    """
    if kind not in ("midpoint", "heun"):
        raise ValueError(f"there is no {kind=}; the choices are 'midpoint' and 'heun'")

    def weights(ch):
        exact = moments(ch, 2)
        return exact if kind == "heun" else [exact[0], exact[0] / 2]

    return _multistep(2, eta, s_noise, weights)


def dpmpp_3m_sde(
    eta: ArrayLike = 1.0,
    s_noise: ArrayLike = 1.0,
    form: str = "taylor",
) -> Solver:
    """SDE-DPM-Solver++(3M): x0 is quadratic in lambda (Lu et al. 2022; Crowson 2022, sample_dpmpp_3m_sde).

    "taylor" integrates the quadratic exactly. "k-diffusion" takes half of the curvature's term, as k-diffusion does.
    "diffusers" follows DPMSolverMultistepScheduler("sde-dpmsolver++", solver_order=3), where moreover a sign is wrong:
    its weight of the curvature does not vanish with the step, so that the order is 1. One call a step.
    Order 2: the first two steps have fewer estimates.

    Raises:
      ValueError: an unknown form.
    """
    if form not in ("taylor", "k-diffusion", "diffusers"):
        raise ValueError(
            f"there is no {form=}; the choices are 'taylor', 'k-diffusion', 'diffusers'"
        )

    def weights(ch):
        m = moments(ch, 3)
        return m if form == "taylor" else [*m[:2], m[2] / 2 - (form == "diffusers")]

    return _multistep(3, eta, s_noise, weights)


def _multistep(order, eta, s_noise, weights):
    def init(x):
        # What is said to be at lambda = -inf is not known.
        return [(jnp.zeros_like(x), jnp.full(x.shape[:1], -jnp.inf, x.dtype))] * (order - 1)

    def step(denoise, x, p, q, memory, rng):
        x0 = denoise(x, p.t).x0
        lam, h, finite = ends(p, q, x)
        history = [(x0, lam), *memory]
        nodes, known = places(history, lam, h, finite)
        ch = jnp.where(finite, (1 + jnp.asarray(eta, h.dtype)) * h, jnp.inf)
        data = integral([value for value, _ in history], nodes, known, weights(ch))
        kept, wide = linear(x, p, q, h, finite, eta)
        z = over(wide * jnp.asarray(s_noise, x.dtype), x) * noise(rng, x.shape, x.dtype)
        return kept + over(q.alpha, x) * data + z, history[: order - 1], x0

    return Solver(init, step)
