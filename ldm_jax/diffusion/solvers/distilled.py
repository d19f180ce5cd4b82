"""Few-step solvers for distilled networks, whose x0 is where the probability-flow ODE ends.

With such a network any number of steps samples the data; with a network that predicts the mean of x0, as the others
are trained to, these solvers do not converge.
"""

import jax.numpy as jnp
from jax.typing import ArrayLike

from ldm_jax.diffusion.process import Path, Point, over, transition
from ldm_jax.diffusion.samplers import Solver, noise

SIGMA_DATA = 0.5  # Song et al. 2023, appendix C; Luo et al. 2023


def lcm(clock: ArrayLike = 9990.0) -> Solver:
    """Multistep consistency sampling (Song et al. 2023, Algorithm 1; Luo et al. 2023, Algorithm 3).

    x0 is noised anew to q. It is c_out x0 + c_skip x with the boundary condition's c_skip = s^2 / (tau^2 + s^2),
    c_out = tau / sqrt(tau^2 + s^2), s = 0.5 and tau = clock t: the default is 10 times the integer time of a table of
    1000, as latent consistency models were trained. One call a step.
    """

    def step(denoise, x, p, q, memory, rng):
        x0 = denoise(x, p.t).x0
        time = jnp.asarray(clock, x.dtype) * p.t
        norm = time**2 + SIGMA_DATA**2
        x0 = over(time / jnp.sqrt(norm), x) * x0 + over(SIGMA_DATA**2 / norm, x) * x
        z = noise(rng, x.shape, x.dtype)
        return over(q.alpha, x) * x0 + over(q.sigma, x) * z, memory, x0

    return Solver(lambda x: (), step)


def tcd(path: Path, gamma: ArrayLike = 0.3) -> Solver:
    """Trajectory consistency distillation, gamma-sampling (Zheng et al. 2024, Algorithm 4).

    A deterministic step to the time (1 - gamma) t_q, rounded down to an entry where the path is a table, and noise
    back up to q. gamma in [0, 1] is a scalar or one value a sample, and may be traced; 0 is `ddim`, 1 noises the
    estimate at the path's clean end. One call a step.

    diffusers calls gamma eta, and its TCDScheduler ends at the table's first entry: a grid with to_zero=False.
    """

    def step(denoise, x, p, q, memory, rng):
        x0, eps = denoise(x, p.t)
        t = (1 - jnp.asarray(gamma, q.t.dtype)) * q.t
        if path.steps:
            last = path.steps - 1.0
            t = jnp.floor(t * last + 1e-3) / last  # what is whole but for rounding stays so
        # Down to q itself where that is clean data, or where nothing is to be noised.
        direct = (q.sigma == 0) | (t >= q.t)
        s = Point(t, path.alpha(t), path.sigma(t))
        s = Point(*(jnp.where(direct, b, a) for a, b in zip(s, q, strict=True)))
        safe = Point(*(jnp.where(q.sigma > 0, a, 1.0) for a in q))
        of_x, variance = transition(safe, Point(s.t, jnp.where(direct, 1.0, s.alpha), s.sigma))
        of_x, variance = jnp.where(direct, 1.0, of_x), jnp.where(direct, 0.0, variance)
        x_s = over(s.alpha, x) * x0 + over(s.sigma, x) * eps
        wide = jnp.sqrt(jnp.maximum(variance, 0.0))
        return over(of_x, x) * x_s + over(wide, x) * noise(rng, x.shape, x.dtype), memory, x0

    return Solver(lambda x: (), step)
