"""What the multistep solvers share: a polynomial through the last predictions, integrated exactly.

Two forms of the probability-flow ODE have one prediction under the integral,

    x_q = sigma_q / sigma_p x_p + sigma_q int x0 d(alpha / sigma)        of = "x0"
    x_q = alpha_q / alpha_p x_p + alpha_q int eps d(sigma / alpha)       of = "eps"

A solver of order n replaces it by the polynomial through its values m_0 (at p), ..., m_{n-1} (before)
in s = (u - u_p) / (u_q - u_p), for a variable u that grows from noise to data, here lambda = log(alpha
/ sigma). With L_k(s) = sum_i c_ki s^i, which is 1 at level k and 0 at the others, a step is

    x_q = [the step of first order] + sum_k w_k (m_k - m_0),     w_k = sum_i c_ki M_i,

and only the moments M_i = int s^i dK of the kernel differ from solver to solver. The sum vanishes where a
step comes from pure noise or goes to clean data: there all of them are of first order.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ldm_jax.diffusion.process import Data, Point, over
from ldm_jax.types import Prediction

Of = Literal["x0", "eps"]
SQUARE, WEIGHT = np.polynomial.legendre.leggauss(16)  # to rounding for |h| < 25


class Past(NamedTuple):
    """The predictions at the last levels, newest first."""

    at: tuple[
        Array, ...
    ]  # u at the levels, each [b]; -inf where there is none or it was pure noise
    m: tuple[Data, ...]
    taken: Array  # int32 [b]: the steps so far, with the one that is being taken


def nothing(count: int) -> Callable[[Data], Past]:
    """x -> an empty memory of that many predictions."""

    def init(x):
        never = jnp.full(x.shape[:1], -jnp.inf, x.dtype)
        taken = jnp.zeros(x.shape[:1], jnp.int32)
        return Past((never,) * count, (jnp.zeros_like(x),) * count, taken)

    return init


def add(past: Past, at: Array, m: Data) -> Past:
    """With one more prediction, and without the oldest."""
    at = jnp.broadcast_to(at, past.at[0].shape)
    return Past((at, *past.at[:-1]), (m, *past.m[:-1]), past.taken + 1)


def allowed(order: int, steps: int | Array | None, taken: Array) -> int | Array:
    """The highest order of a step: 1 in the last of `steps`, 2 in the one before, and so on."""
    return order if steps is None else jnp.minimum(order, steps + 1 - taken)


def nodes(at: Sequence[Array], to: Array, limit: int | Array) -> tuple[Array, list, list]:
    """u_q - u_p (0 where one of them is infinite), s at each level, and which levels are used.

    As many as `limit`, from the newest on, as long as u falls.
    """
    h = to - at[0]
    ok = jnp.isfinite(h) & (h > 0)
    h = jnp.where(ok, h, 0.0)
    s, used = [jnp.zeros_like(h)], [jnp.ones_like(ok)]
    for k in range(1, len(at)):
        ok = ok & jnp.isfinite(at[k]) & (at[k] < at[k - 1]) & (k < limit)
        s.append(jnp.where(ok, at[k] - at[0], 0.0) / jnp.where(ok, h, 1.0))
        used.append(ok)
    return h, s, used


def weights(s: Sequence[Array], used: Sequence[Array], moments: Sequence[Array]) -> list[Array]:
    """w_1, w_2, ... of the module's docstring: from the integrals of 1, s, s^2, ... those of L_k."""
    out = []
    for k in range(1, len(s)):
        c = [jnp.ones_like(s[k])] + [jnp.zeros_like(s[k])] * (len(s) - 1)
        for j in set(range(len(s))) - {k}:
            both = used[j] & used[k]
            gap = jnp.where(both, s[k] - s[j], 1.0)
            raised = [0.0, *c[:-1]]
            c = [
                jnp.where(both, (up - s[j] * low) / gap, low)
                for up, low in zip(raised, c, strict=True)
            ]
        total = sum(a * b for a, b in zip(c, moments, strict=True))
        out.append(jnp.where(used[k], total, 0.0))
    return out


def scale(q: Point, h: Array, of: Of) -> Array:
    """The kernel at the end of the step: sigma_q d(alpha / sigma) or alpha_q d(sigma / alpha), by ds."""
    return q.alpha * h if of == "x0" else -q.sigma * h


def exponential(q: Point, h: Array, of: Of, count: int) -> list[Array]:
    """M_i = scale * int_0^1 s^i exp(z (1 - s)) ds, z = -h for x0 and h for eps.

    That is scale * i! phi_{i+1}(z), whose recursion loses all digits of float32 at small h; hence a
    quadrature.
    """
    s, w = (jnp.asarray(a, h.dtype) for a in ((SQUARE + 1) / 2, WEIGHT / 2))
    kernel = w * jnp.exp((-h if of == "x0" else h)[..., None] * (1 - s))
    return [scale(q, h, of) * (kernel * s**i).sum(-1) for i in range(count)]


def first(x: Data, prediction: Prediction, p: Point, q: Point) -> Data:
    """The step of first order, in the form that holds from pure noise to clean data."""
    d_alpha, d_sigma = over(q.alpha - p.alpha, x), over(q.sigma - p.sigma, x)
    return x + d_alpha * prediction.x0 + d_sigma * prediction.eps


def change(w: Sequence[Array], m: Sequence[Data]) -> Data:
    """sum_k w_k (m_k - m_0)"""
    zero = jnp.zeros_like(m[0])
    return sum((over(a, m[0]) * (b - m[0]) for a, b in zip(w, m[1:], strict=True)), zero)
