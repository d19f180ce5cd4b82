"""DPM-Solver (Lu et al. 2022) and DPM-Solver++ (Lu et al. 2022b): exponential integrators in lambda.

DPM-Solver approximates eps, DPM-Solver++ x0. A multistep solver takes its polynomial from the steps
before, a single-step one from within groups of steps, whose later steps start over from the group's
first level with what was learned on the way.
"""

from typing import Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from ldm_jax.diffusion.process import Path, level, log_ratio, over
from ldm_jax.diffusion.samplers import Solver
from ldm_jax.diffusion.solvers import multistep as ms
from ldm_jax.types import Prediction

ALGORITHMS = {"dpmsolver++": "x0", "dpmsolver": "eps"}
TYPES = ("midpoint", "heun")
Algorithm = Literal["dpmsolver++", "dpmsolver"]
Type = Literal["midpoint", "heun"]


def _of(order, algorithm, solver_type):
    if order not in (1, 2, 3):
        raise ValueError(f"there is no {order=} of this solver; the choices are 1, 2 and 3")
    if algorithm not in ALGORITHMS:
        raise ValueError(f"there is no {algorithm=}; the choices are {list(ALGORITHMS)}")
    if solver_type not in TYPES:
        raise ValueError(f"there is no {solver_type=}; the choices are {list(TYPES)}")
    return ALGORITHMS[algorithm]


def dpm_solver(
    order: int = 2,
    algorithm: Algorithm = "dpmsolver++",
    solver_type: Type = "midpoint",
    halved: bool = False,
    steps: int | Array | None = None,
) -> Solver:
    """Multistep DPM-Solver(++), with one call of the network a step.

    Order 1, 2 or 3 once the memory is full; the first steps have order 1, 2. With
    `solver_type="heun"` the integrals of second order are exact, with "midpoint" M_1 = M_0 / 2; both
    are of the same order. The third order is always exact: the polynomial's second derivative is
    2 (D1_0 - D1_1) / (r_0 + r_1). The authors' code and diffusers leave out the 2, with which error the
    method falls back to second order; `halved=True` does as they do. Where the number of steps of
    the grid is given, the order falls to 2 and 1 in the last two steps, as it does in diffusers with
    `lower_order_final` for fewer than 15 steps.

    Raises:
      ValueError: an unknown order, algorithm or solver type.
    """
    of = _of(order, algorithm, solver_type)

    def step(denoise, x, p, q, past, rng):
        prediction = denoise(x, p.t)
        past = ms.add(past, log_ratio(p), getattr(prediction, of))
        limit = ms.allowed(order, steps, past.taken)
        h, s, used = ms.nodes(past.at, log_ratio(q), limit)
        moments = ms.exponential(q, h, of, order)
        if order > 1 and solver_type == "midpoint":
            moments[1] = jnp.where(used[-1] & (order > 2), moments[1], moments[0] / 2)
        if order > 2 and halved:
            moments[2] = moments[2] / 2
        w = ms.weights(s, used, moments)
        return ms.first(x, prediction, p, q) + ms.change(w, past.m), past, prediction.x0

    return Solver(ms.nothing(order), step)


def dpmpp_2m() -> Solver:
    """DPM-Solver++(2M) (Lu et al. 2022b, Algorithm 2): x0 is extrapolated linearly in lambda.

    Order 2 with one call a step. The first step and the one to clean data are of order 1, as is the
    second on a path that starts from pure noise (lambda = -inf there).
    """
    return dpm_solver(2)


def dpmpp_3m(steps: int | Array | None = None) -> Solver:
    """DPM-Solver++(3M): `dpm_solver` of order 3, where x0 is extrapolated by a parabola in lambda."""
    return dpm_solver(3, steps=steps)


def dpm_solver_singlestep(
    order: int = 2, algorithm: Algorithm = "dpmsolver++", solver_type: Type = "midpoint"
) -> Solver:
    """Single-step DPM-Solver(++) on the levels of the grid: groups of `order` steps, one call a step.

    As in diffusers the inner levels of a step of the papers are levels of the grid, so one such step
    is `order` steps here, of orders 1, 2, 3 from the same level; of them only the last is accurate.
    A step to clean data is of order 1 and starts at its own level, and from pure noise a group is a
    single step. "heun" interpolates m at all levels of a group; "midpoint" is the papers' choice: M_1 =
    M_0 / 2 in the second order, and only the first and the last level in the third, which is
    of order 3 where that lies at 2/3 of the step in lambda (r_2 = 2/3, the papers' default).

    Raises:
      ValueError: an unknown order, algorithm or solver type.
    """
    of = _of(order, algorithm, solver_type)

    def init(x):
        full = jnp.full(x.shape[:1], order, jnp.int32)
        level = (jnp.zeros(x.shape[:1], x.dtype),) * 2
        return ms.nothing(order)(x), full, (x, *level, -jnp.inf + level[0], Prediction(x, x))

    def step(denoise, x, p, q, memory, rng):
        past, taken, anchor = memory
        prediction, lam = denoise(x, p.t), log_ratio(p)
        past = ms.add(past, lam, getattr(prediction, of))
        anew = (taken == order) | jnp.isinf(anchor[3]) | jnp.isinf(log_ratio(q))
        taken = jnp.where(anew, 1, taken + 1)

        def pick(here, there):
            there, here = jnp.broadcast_arrays(there, here)
            return jnp.where(anew.reshape((-1,) + (1,) * (there.ndim - 1)), here, there)

        b = x.shape[:1]
        here = (x, *(jnp.broadcast_to(a, b) for a in (p.alpha, p.sigma, lam)))
        start, alpha, sigma, lam = (pick(*pair) for pair in zip(here, anchor[:4], strict=True))
        known = Prediction(*(pick(*pair) for pair in zip(prediction, anchor[4], strict=True)))
        h = log_ratio(q) - lam
        ok = jnp.isfinite(h) & (h > 0)
        h = jnp.where(ok, h, 0.0)
        s, used = [jnp.zeros_like(h)], [jnp.ones_like(ok)]
        for k in range(order - 1):  # the newest level first
            inside = ok & (taken > k + 1) & (past.at[k] > lam)
            if k == 1:
                inside = inside & (past.at[1] < past.at[0]) & (solver_type == "heun")
            s.append(jnp.where(inside, past.at[k] - lam, 0.0) / jnp.where(inside, h, 1.0))
            used.append(inside)
        moments = ms.exponential(q, h, of, order)
        if order > 1 and solver_type == "midpoint":
            moments[1] = jnp.where(taken > 2, moments[1], moments[0] / 2)
        w = ms.weights(s, used, moments)
        base = ms.first(start, known, p._replace(alpha=alpha, sigma=sigma), q)
        x_q = base + ms.change(w, (getattr(known, of), *past.m[: order - 1]))
        return x_q, (past, taken, (start, alpha, sigma, lam, known)), prediction.x0

    return Solver(init, step)


def dpm2(path: Path) -> Solver:
    """The midpoint method in log(sigma / alpha): DPM-Solver-2 (Lu et al. 2022, Algorithm 1 with r = 1/2).

    Also known as Karras et al. 2022's second-order family with the midpoint in log-sigma, as k-diffusion
    has it. Order 2; two calls a step, the second halfway; one in a step to clean data or from pure noise.
    """

    def step(denoise, x, p, q, memory, rng):
        prediction = denoise(x, p.t)
        start, end = log_ratio(p), log_ratio(q)
        inner = jnp.isfinite(start) & jnp.isfinite(end)
        middle = level(path, jnp.where(inner, (start + end) / 2, 0.0))
        euler = ms.first(x, prediction, p, q)

        def corrected():
            halfway = denoise(ms.first(x, prediction, p, middle), middle.t)
            span = q.sigma - q.alpha * p.sigma / jnp.where(inner, p.alpha, 1.0)
            return euler + over(jnp.where(inner, span, 0.0), x) * (halfway.eps - prediction.eps)

        return lax.cond(jnp.any(inner), corrected, lambda: euler), memory, prediction.x0

    return Solver(lambda x: (), step)
