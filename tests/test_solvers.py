import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion import paths, process, samplers, solvers, targets
from ldm_jax.diffusion.process import Point
from ldm_jax.types import Prediction
from tests.exact import COV, KEY, MEAN, NO_COND, PATHS, SOLVERS, Mixture, gaussian, run, run_all

# Two clusters of unequal weight and width: the flow is far from linear.
MIXTURE = Mixture([0.35, 0.65], [-1.2, 0.6], [0.35, 0.5])


ORDERS = {"ddim": 1, "heun": 2, "dpmpp_2m": 2}  # euler is ddim, see below


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
        assert slope(counts, found[solver]) == pytest.approx(order, abs=0.1), (
            solver,
            found[solver],
        )


@pytest.mark.parametrize("name", ["rectified_flow", "edm"])
def test_convergence_orders_over_the_whole_path(name):
    """From pure noise in uniform times, where lambda goes to -inf and +inf on the flow: 2M loses a logarithm."""
    path, counts = PATHS[name], (64, 128, 256)
    with jax.enable_x64(True):
        found = errors(path, [samplers.grid(path, n, to_zero=False) for n in counts], list(ORDERS))
    for solver, order in ORDERS.items():
        slack = 0.4 if solver == "dpmpp_2m" and name == "rectified_flow" else 0.1
        assert slope(counts, found[solver]) == pytest.approx(order, abs=slack), (
            solver,
            found[solver],
        )


def chain(points, solver):
    """Mean and covariance at the end of a stochastic solver's chain on this data, by its recursion in numpy."""
    alpha, sigma = (np.asarray(a, float) for a in (points.alpha, points.sigma))
    mean, cov, eye = np.zeros(2), (alpha[0] ** 2 + sigma[0] ** 2) * np.eye(2), np.eye(2)
    for ap, sp, aq, sq in zip(alpha[:-1], sigma[:-1], alpha[1:], sigma[1:], strict=True):
        step = sp**2 - (ap / aq * sq) ** 2  # variance of the noising step
        small = step * sq**2 / sp**2
        if solver == "ddim_eta":
            up = 0.7**2 * small
            of_x = np.sqrt(sq**2 - up) / sp
            of_x0 = aq - of_x * ap
        else:
            up = (step if sq > 0 else 0.0) if solver == "ddpm_large" else small
            of_x, of_x0 = ap / aq * sq**2 / sp**2, aq * step / sp**2
        gain = ap * COV @ np.linalg.inv(ap**2 * COV + sp**2 * eye)
        mean = of_x0 * (MEAN + gain @ (mean - ap * MEAN)) + of_x * mean
        a = of_x0 * gain + of_x * eye
        cov = a @ cov @ a.T + up * eye
    return mean, cov


@pytest.mark.parametrize("name", ["scaled_linear", "zero_snr", "rectified_flow", "edm"])
def test_stochastic_solvers_reproduce_mean_and_covariance(name):
    """Of correlated Gaussian data from an exact denoiser: up to Monte-Carlo error, and in the limit."""
    path, n, names = PATHS[name], 40000, ["ddpm", "ddpm_large", "ddim_eta"]
    points = samplers.grid(path, 32)
    x_T = samplers.initial_noise(points, KEY, (n, 2))
    for solver, x in run_all(gaussian(path, MEAN, COV), names, points, x_T).items():
        mean, cov = chain(points, solver)
        np.testing.assert_allclose(x.mean(0), mean, atol=4 * (0.6 / n) ** 0.5, err_msg=solver)
        np.testing.assert_allclose(np.cov(x.T), cov, atol=4 * 0.6 * (2 / n) ** 0.5, err_msg=solver)
        bias = [np.abs(chain(samplers.grid(path, k), solver)[1] - COV).max() for k in (128, 512)]
        assert bias[1] < 0.35 * bias[0], solver
        assert bias[1] < 0.04, solver


def test_a_single_step_gives_the_estimate_at_the_first_level():
    path = paths.rectified_flow()
    denoise = gaussian(path, MEAN, COV)
    x_T = jax.random.normal(KEY, (3, 2))
    want = denoise(x_T, jnp.ones(3), NO_COND).x0
    for name, got in run_all(denoise, list(SOLVERS), samplers.grid(path, 1), x_T).items():
        np.testing.assert_allclose(got, want, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("name", ["rectified_flow", "scaled_linear", "edm"])
def test_euler_is_ddim(name):
    path = PATHS[name]
    points, denoise = samplers.grid(path, 12), gaussian(path, MEAN, COV)
    x_T = samplers.initial_noise(points, KEY, (4, 3, 2))
    ends = run_all(denoise, ["euler", "ddim"], points, x_T)
    np.testing.assert_allclose(ends["euler"], ends["ddim"], atol=2e-5)


def test_euler_and_heun_on_a_rectified_flow_are_the_textbooks():
    """dx/dt = velocity, stepped in t, in numpy."""
    path = paths.rectified_flow()
    denoise = gaussian(path, MEAN, COV)

    def velocity(x, t):
        x0, eps = denoise(jnp.asarray(x), jnp.full(len(x), t, jnp.float32), NO_COND)
        return np.asarray(eps - x0)

    x_T = np.asarray(jax.random.normal(KEY, (3, 2)))
    x, y, dt = x_T, x_T, -1 / 8
    for i in range(8):
        t = 1 - i / 8
        x = x + dt * velocity(x, t)
        first = velocity(y, t)
        second = first if i == 7 else velocity(y + dt * first, t + dt)
        y = y + dt * (first + second) / 2
    points = samplers.grid(path, 8)
    np.testing.assert_allclose(run(denoise, solvers.euler(), points, x_T)[0], x, atol=1e-5)
    np.testing.assert_allclose(run(denoise, solvers.heun(), points, x_T)[0], y, atol=1e-5)


def test_heun_on_edm_is_algorithm_1_of_karras():
    path, n = paths.edm(), 6
    denoise = gaussian(path, MEAN, COV)
    sigma = [
        (80 ** (1 / 7) + i / (n - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(n)
    ] + [0.0]
    points = samplers.grid(path, n)
    np.testing.assert_allclose(points.sigma, sigma, rtol=1e-4)

    def slope_at(x, s):
        t = path.time_of(-jnp.log(jnp.full(len(x), s)))
        return (x - np.asarray(denoise(jnp.asarray(x), t, NO_COND).x0)) / s

    x_T = 80 * np.asarray(jax.random.normal(KEY, (3, 2)))
    x = x_T
    for s, s_next in itertools.pairwise(sigma):
        d = slope_at(x, s)
        guess = x + (s_next - s) * d
        x = guess if s_next == 0 else x + (s_next - s) * (d + slope_at(guess, s_next)) / 2
    np.testing.assert_allclose(
        run(denoise, solvers.heun(), points, x_T)[0], x, rtol=1e-3, atol=2e-3
    )


def test_ddim_with_eta_1_is_ddpm_on_the_full_table():
    path = paths.ddpm("linear", 1e-4, 0.02, steps=100)
    denoise = gaussian(path, MEAN, COV)
    x_T = jax.random.normal(KEY, (4, 2))
    for spacing in ("leading", "trailing", "linspace"):
        points = samplers.grid(path, 100, spacing)
        np.testing.assert_array_equal(
            np.round(np.asarray(points.t[:-1]) * 99), np.arange(99, -1, -1)
        )
    a, b = (run(denoise, s, points, x_T)[0] for s in (solvers.ddim(1.0), solvers.ddpm("small")))
    np.testing.assert_allclose(a, b, atol=1e-4)


def test_ddim_follows_compvis_sampler():
    """Its `ddim_sampling` for eps models in numpy: times (0, 20, ...) + 1, and abar_0 after the last step."""
    path = PATHS["scaled_linear"]
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    abar = np.cumprod(1 - betas)
    times = np.arange(0, 1000, 20) + 1
    x = x_T = np.asarray(jax.random.normal(KEY, (2, 4)))

    def network(x, t, c):
        return jnp.tanh(x) * (0.5 + t[:, None] / 2000)

    for i in range(len(times) - 1, -1, -1):
        a, a_prev = abar[times[i]], abar[times[i - 1]] if i else abar[0]
        e = np.asarray(network(jnp.asarray(x), jnp.full(2, float(times[i])), NO_COND))
        pred = (x - np.sqrt(1 - a) * e) / np.sqrt(a)
        x = np.sqrt(a_prev) * pred + np.sqrt(1 - a_prev) * e
    denoise = process.make_denoiser(network, path, targets.eps())
    got, _ = run(denoise, solvers.ddim(), samplers.grid(path, 50, "leading", to_zero=False), x_T)
    np.testing.assert_allclose(got, x, rtol=2e-3, atol=2e-3)


def test_dpmpp_2m_follows_the_paper():
    """Lu et al. 2022, Algorithm 2 in float64 with h and r as printed there; the last step is of order 1."""
    path, n = PATHS["cosine"], 10
    denoise = gaussian(path, MEAN, COV)
    points = samplers.grid(path, n, "log_snr")
    alpha, sigma = (np.asarray(a, float) for a in (points.alpha, points.sigma))
    x_T = np.asarray(jax.random.normal(KEY, (3, 2)))
    x, before, lam = x_T, None, np.log(np.maximum(alpha, 1e-30) / np.maximum(sigma, 1e-30))
    for i in range(n):
        data = np.asarray(
            denoise(jnp.asarray(x, jnp.float32), jnp.full(3, points.t[i]), NO_COND).x0
        )
        d, h = data, lam[i + 1] - lam[i]
        if 1 < i < n - 1:
            r = (lam[i] - lam[i - 1]) / h
            d = (1 + 1 / (2 * r)) * data - before / (2 * r)
        x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * np.expm1(-h) * d
        before = data
    got, _ = run(denoise, solvers.dpmpp_2m(), points, x_T)
    np.testing.assert_allclose(got, x, atol=1e-3)


def test_eta_0_is_deterministic_and_eta_1_is_not():
    path = PATHS["cosine"]
    denoise, points = gaussian(path, MEAN, COV), samplers.grid(path, 6)
    x_T = jax.random.normal(KEY, (4, 2))

    def ends(eta):
        return [
            run(denoise, solvers.ddim(eta), points, x_T, jax.random.key(seed))[0] for seed in (1, 2)
        ]

    np.testing.assert_array_equal(*ends(0.0))
    assert not np.allclose(*ends(1.0))


# The phrases of the table in `solvers`, for n steps of a grid from some noise to clean data.
CALLS = {
    "1 a step": lambda n: n,
    "2 a step, 1 in the last": lambda n: 2 * n - 1,
    "2 a step, 1 from pure noise and to clean data": lambda n: 2 * n - 1,
    "2 a step down, 1 in the last, 0 a step up": lambda n: 2 * n - 1,
    "1 a step, 2 in the first": lambda n: n + 1,
    "1 a step, 4 in each of the first 3": lambda n: n + 9,
}


@pytest.mark.parametrize("name", solvers.TABLE)
def test_network_calls_a_step(name):
    """As the table says, counted while running."""
    path, steps, count = PATHS["scaled_linear"], 7, []
    about = solvers.TABLE[name]

    def denoise(x, t, cond):
        jax.debug.callback(lambda: count.append(1))
        return Prediction(x, x)

    x, _ = run(denoise, solvers.make(name, path), samplers.grid(path, steps), jnp.ones((1, 2)))
    jax.block_until_ready(x)
    jax.effects_barrier()
    assert len(count) == CALLS[about.calls](steps)
