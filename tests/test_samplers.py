import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import NO_COND, PATHS, Mixture, gaussian

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


@pytest.mark.parametrize("spacing", ["uniform", "log_snr"])
@pytest.mark.parametrize("name", ["scaled_linear", "cosine", "rectified_flow", "edm"])
def test_convergence_orders_on_a_gaussian_mixture(name, spacing):
    """Against the exact flow, which keeps quantiles, from the path's noisy end to its cleanest level."""
    path, u = PATHS[name], np.linspace(0.02, 0.98, 25)
    counts = (32, 64, 128, 256)
    with jax.enable_x64(True):
        denoise = MIXTURE.denoiser(path)
        errors = {solver: [] for solver in ORDERS}
        for n in counts:
            points = samplers.grid(path, n, spacing, to_zero=False, sigma_min=0.02, sigma_max=40.0)
            points = Point(*(jnp.asarray(a, float) for a in points))
            points = Point(points.t, path.alpha(points.t), path.sigma(points.t))
            start, end = ((float(points.alpha[i]), float(points.sigma[i])) for i in (0, -1))
            x_T = jnp.asarray(MIXTURE.quantiles(u, *start))[None, :, None]
            want = MIXTURE.quantiles(u, *end)
            for solver in ORDERS:
                got, _ = run(denoise, SOLVERS[solver], points, x_T)
                errors[solver].append(np.sqrt(np.mean((np.asarray(got)[0, :, 0] - want) ** 2)))
    slopes = {s: -np.polyfit(np.log(counts), np.log(e), 1)[0] for s, e in errors.items()}
    print(name, spacing, slopes, {s: e[-1] for s, e in errors.items()})
    for solver, order in ORDERS.items():
        assert slopes[solver] == pytest.approx(order, abs=0.2), slopes
