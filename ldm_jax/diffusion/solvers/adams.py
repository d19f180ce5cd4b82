"""Adams-Bashforth methods on eps: with variable steps in sigma / alpha (LMS, DEIS), and pseudo-linear ones.

All of them are the second form of `multistep`; the pseudo-linear ones use the coefficients for equal steps
whatever the steps are.
"""

from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from ldm_jax.diffusion.process import Path, Point, log_ratio, over
from ldm_jax.diffusion.samplers import Solver
from ldm_jax.diffusion.solvers import multistep as ms
from ldm_jax.diffusion.solvers.dpm import dpm_solver

# Row k is Adams-Bashforth of order k + 1 in equal steps, newest first.
EQUAL = (
    (1.0, 0.0, 0.0, 0.0),
    (3 / 2, -1 / 2, 0.0, 0.0),
    (23 / 12, -16 / 12, 5 / 12, 0.0),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def _span(p: Point, q: Point) -> Array:
    """alpha_q times the step in sigma / alpha; 0 from pure noise, where it is infinite."""
    whole = q.sigma - q.alpha * p.sigma / jnp.where(p.alpha > 0, p.alpha, 1.0)
    return jnp.where(p.alpha > 0, whole, 0.0)


def lms(order: int = 4) -> Solver:
    """Linear multistep: Adams-Bashforth in sigma / alpha with exact variable-step coefficients.

    k-diffusion's `lms`, and rhoAB-DEIS of Zhang & Chen 2023. Order 1 to 4 once the memory is full,
    also in the step to clean data; one call a step. The integrals are exact, where diffusers has an
    adaptive quadrature.

    Raises:
      ValueError: an order that is not 1, 2, 3 or 4.
    """
    if order not in (1, 2, 3, 4):
        raise ValueError(f"there is no {order=} of LMS; the choices are 1, 2, 3 and 4")

    def step(denoise, x, p, q, past, rng):
        prediction = denoise(x, p.t)
        past = ms.add(past, -p.sigma / p.alpha, prediction.eps)
        h, s, used = ms.nodes(past.at, -q.sigma / q.alpha, order)
        w = ms.weights(s, used, [-q.alpha * h / (i + 1) for i in range(order)])
        return ms.first(x, prediction, p, q) + ms.change(w, past.m), past, prediction.x0

    return Solver(ms.nothing(order), step)


def deis(
    order: int = 3,
    variable: Literal["log_rho", "rho"] = "log_rho",
    steps: int | Array | None = None,
) -> Solver:
    """DEIS (Zhang & Chen 2023): eps is a polynomial of degree `order` - 1 in log(rho) or rho = sigma / alpha.

    The integrals are exact. log(rho) is -lambda, so the first is DPM-Solver with exact integrals,
    and it is what diffusers has; the second is `lms`. Orders 1 to 3, one call a step. `steps`
    is as in `dpm_solver`.

    Raises:
      ValueError: an unknown order or variable, or `steps` with the variable rho.
    """
    if variable == "log_rho":
        return dpm_solver(order, "dpmsolver", "heun", steps=steps)
    if variable != "rho":
        raise ValueError(f"there is no {variable=}; the choices are 'log_rho' and 'rho'")
    if steps is not None:
        raise ValueError(
            "with the variable 'rho' the order does not fall at the end; leave out steps"
        )
    return lms(order)


def _pseudo(start: Callable) -> Solver:
    """The coefficients of equal steps; `start` improves on the eps of the first ones."""

    def step(denoise, x, p, q, past, rng):
        prediction = denoise(x, p.t)
        past = ms.add(past, log_ratio(p), prediction.eps)
        row = jnp.asarray(EQUAL, x.dtype)[jnp.minimum(past.taken, 4) - 1]
        eps = sum(row[k] * m for k, m in enumerate(past.m))
        inner = over((p.alpha > 0) & (q.sigma > 0), x)

        def move(eps, q):
            return ms.first(x, prediction, p, q) + over(_span(p, q), x) * (eps - prediction.eps)

        eps = start(denoise, move, prediction.eps, eps, p, q, past.taken, inner)
        return move(eps, q), past, prediction.x0

    def init(x):
        # One number of steps for all samples: the first steps are a branch.
        return ms.nothing(4)(x)._replace(taken=jnp.zeros((), jnp.int32))

    return Solver(init, step)


def ipndm() -> Solver:
    """iPNDM (Zhang & Chen 2023, Appendix H.2): coefficients of equal steps, orders 1, 2, 3 and then 4.

    The coefficients average eps as if sigma / alpha were linear in the number of steps, so the order
    of the error is 2, though with a small constant. One call a step.
    """
    return _pseudo(lambda denoise, move, here, eps, p, q, taken, inner: eps)


def plms() -> Solver:
    """PLMS (Liu et al. 2022, in the form of Stable Diffusion): iPNDM with the trapezoid as its first step.

    diffusers' PNDM with `skip_prk_steps`. One call a step, two in the first, unless that is also the last or
    comes from pure noise. The multistep formula is of eps, as in the paper; diffusers applies it to what
    the network predicts, which is another method for the target v. Order 2, see `ipndm`.
    """

    def start(denoise, move, here, eps, p, q, taken, inner):
        def trapezoid():
            return jnp.where(inner, (here + denoise(move(here, q), q.t).eps) / 2, eps)

        return lax.cond((taken == 1) & jnp.any(inner), trapezoid, lambda: eps)

    return _pseudo(start)


def pndm(path: Path) -> Solver:
    """F-PNDM (Liu et al. 2022, Algorithm 2): three pseudo Runge-Kutta steps, then iPNDM.

    The halfway levels are those of the mean time. One call a step, four in each of the first
    three, unless that is the last or comes from pure noise. Order 2, see `ipndm`.
    """

    def start(denoise, move, here, eps, p, q, taken, inner):
        t = (p.t + q.t) / 2
        middle = Point(t, path.alpha(t), path.sigma(t))
        to = Point(*(jnp.stack([a, a, b]) for a, b in zip(middle, q, strict=True)))

        def stage(eps, inputs):
            level, weight = inputs
            eps = denoise(move(eps, level), level.t).eps
            return eps, weight * eps

        def runge_kutta():
            share = jnp.array([2, 2, 1], here.dtype) / 6
            _, parts = lax.scan(stage, here, (to, share))
            return jnp.where(inner, here / 6 + parts.sum(0), eps)

        return lax.cond((taken <= 3) & jnp.any(inner), runge_kutta, lambda: eps)

    return _pseudo(start)
