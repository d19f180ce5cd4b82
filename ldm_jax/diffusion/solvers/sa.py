"""SA-Solver: stochastic Adams methods for the SDE of any noise strength (Xue et al. 2023)."""

import jax.numpy as jnp
from jax.typing import ArrayLike

from ldm_jax.diffusion.process import over
from ldm_jax.diffusion.samplers import Solver, noise
from ldm_jax.diffusion.solvers.sde_multistep import ends, integral, linear, moments, places

MOST = 4  # estimates of x0 in one polynomial


def sa_solver(
    predictor: int = 2,
    corrector: int = 2,
    tau: ArrayLike = 1.0,
    begin: ArrayLike = 1.0,
    end: ArrayLike = 0.0,
    simple: bool = False,
) -> Solver:
    """SA-Solver on x0 (Xue et al. 2023, Algorithm 1). One call a step.

    A step is a stochastic Adams-Bashforth step through the last `predictor` estimates, 1 to 4. The next one asks the
    network there, takes the step again with the same noise as an Adams-Moulton step through `corrector` estimates,
    that one included, 0 (none) to 4, and goes on from there without asking again. `tau` is the strength of the noise
    (1: the reverse-time SDE; 0: the ODE) in steps from times end <= t <= begin, and 0 elsewhere; all three are
    scalars or one value a sample, and may be traced. Order 2: the first steps have
    fewer estimates.

    diffusers' SASolverScheduler deviates from the exact coefficients where two estimates are in use, as the paper's
    code does; `simple=True` does so too. Its default tau is 1 for integer times of 200 to 800.

    Raises:
      ValueError: too many estimates, or too few.
    """
    if not 1 <= predictor <= MOST or not 0 <= corrector <= MOST:
        raise ValueError(
            f"{predictor=} must be of 1 to {MOST} and {corrector=} of 0 to {MOST} estimates"
        )
    past = max(predictor - 1, corrector - 1, 1 if corrector else 0)

    def adams(x, p, q, z, history, tau, after=()):
        """From p to q; `after` is the estimate at q, if it is known."""
        lam, h, finite = ends(p, q, x)
        nodes, known = places(history, lam, h, finite)
        if after:
            nodes = [jnp.ones_like(h), *nodes]
            known = [jnp.ones_like(finite), *(k & finite for k in known)]
        tau2 = tau**2
        ch = jnp.where(finite, (1 + tau2) * h, jnp.inf)
        weights = moments(ch, len(nodes))
        if simple and len(nodes) > 1:
            two = sum(k.astype(int) for k in known) == 2
            weights[1] = jnp.where(two & finite, ch / 2, weights[1])
        values = [*after, *(value for value, _ in history)]
        kept, wide = linear(x, p, q, h, finite, tau2)
        return kept + over(q.alpha, x) * integral(values, nodes, known, weights) + over(wide, x) * z

    def init(x):
        rows = jnp.zeros(x.shape[:1], x.dtype)
        history = [(jnp.zeros_like(x), rows - jnp.inf)] * past
        last = (x, jnp.zeros_like(x), (rows, rows + 1, rows + 1), rows)
        return history, last, jnp.zeros((), bool)

    def step(denoise, x, p, q, memory, rng):
        history, (x_last, z_last, o, tau_last), started = memory
        x0 = denoise(x, p.t).x0
        p_rows, q_rows = (type(p)(*(jnp.broadcast_to(a, x.shape[:1]) for a in at)) for at in (p, q))
        if corrector:
            before = type(p)(*o)
            again = adams(x_last, before, p_rows, z_last, history[: corrector - 1], tau_last, (x0,))
            x = jnp.where(started, again, x)
        lam = ends(p, q, x)[0]
        history = [(x0, lam), *history]
        inside = (p_rows.t <= begin) & (p_rows.t >= end)
        now = jnp.where(inside, jnp.asarray(tau, x.dtype), 0.0)
        z = noise(rng, x.shape, x.dtype)
        x_q = adams(x, p_rows, q_rows, z, history[:predictor], now)
        return x_q, (history[:past], (x, z, tuple(p_rows), now), jnp.ones((), bool)), x0

    return Solver(init, step)
