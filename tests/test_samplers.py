import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.exact import NO_COND, PATHS, Mixture, gaussian

from ldm_jax.diffusion import guidance, paths, process, samplers, solvers, targets
from ldm_jax.diffusion.process import Point
from ldm_jax.types import Cond, Prediction

KEY = jax.random.key(0)
SOLVERS = {
    "ddpm": solvers.ddpm(),
    "ddpm_large": solvers.ddpm("large"),
    "ddim": solvers.ddim(),
    "ddim_eta": solvers.ddim(0.7),
    "euler": solvers.euler(),
    "heun": solvers.heun(),
    "dpmpp_2m": solvers.dpmpp_2m(),
}
# Two clusters of unequal weight and width: the flow is far from linear.
MIXTURE = Mixture([0.35, 0.65], [-1.2, 0.6], [0.35, 0.5])


def run(denoise, solver, points, x_T, key=KEY, **kwargs):
    return jax.jit(lambda points, x, key: samplers.sample(denoise, solver, points, x, key, NO_COND, **kwargs))(
        points, x_T, key
    )


ORDERS = {"ddim": 1, "euler": 1, "heun": 2, "dpmpp_2m": 2}


def errors(path, grids, names):
    """{solver: the error of each grid}, against the exact flow of the mixture, which keeps quantiles."""
    u, denoise, out = np.linspace(0.02, 0.98, 9), MIXTURE.denoiser(path), []

    @jax.jit
    def solve(points, x_T):
        return [samplers.sample(denoise, SOLVERS[s], points, x_T, KEY, NO_COND)[0] for s in names]

    for points in grids:
        start, end = (MIXTURE.quantiles(u, points.alpha[i], points.sigma[i]) for i in (0, -1))
        found = solve(points, jnp.asarray(start)[None, :, None])
        out.append([np.sqrt(np.mean((np.asarray(x)[0, :, 0] - end) ** 2)) for x in found])
    return dict(zip(names, np.array(out).T, strict=True))


def slope(counts, error):
    return -np.polyfit(np.log(counts), np.log(error), 1)[0]


@pytest.mark.parametrize("name", ["scaled_linear", "cosine", "rectified_flow", "edm"])
def test_convergence_orders_on_a_gaussian_mixture(name):
    """Between two noise levels that all paths have, in equal steps of lambda."""
    path, counts = PATHS[name], (32, 64, 128)
    with jax.enable_x64(True):
        times = [path.time_of(jnp.linspace(-2.6, 3.5, n + 1, dtype=float)) for n in counts]
        found = errors(path, [Point(t, path.alpha(t), path.sigma(t)) for t in times], list(ORDERS))
    for solver, order in ORDERS.items():
        assert slope(counts, found[solver]) == pytest.approx(order, abs=0.1), (solver, found[solver])


@pytest.mark.parametrize("name", ["rectified_flow", "edm"])
def test_convergence_orders_over_the_whole_path(name):
    """From pure noise in uniform times, where lambda goes to -inf and +inf on the flow: 2M loses a logarithm."""
    path, counts = PATHS[name], (64, 128, 256)
    with jax.enable_x64(True):
        found = errors(path, [samplers.grid(path, n, to_zero=False) for n in counts], list(ORDERS))
    for solver, order in ORDERS.items():
        slack = 0.4 if solver == "dpmpp_2m" and name == "rectified_flow" else 0.1
        assert slope(counts, found[solver]) == pytest.approx(order, abs=slack), (solver, found[solver])
