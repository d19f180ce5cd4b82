"""Stochastic solvers: the law of what they sample, exactly for Gaussian data and by Monte Carlo for a mixture.

On Gaussian data the denoiser is linear, and so is a sampler: fed with unit vectors in place of its noises, it returns
the weights of each in its result, whose squares add up to the covariance. No chance is involved.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion import grids, samplers, solvers
from ldm_jax.diffusion.process import Point
from ldm_jax.types import Prediction
from tests.exact import COV, KEY, MEAN, NO_COND, PATHS, Mixture, gaussian, run

EYE = np.eye(2)
N = 24  # steps of the coarser of two grids


def made(path, churn=0.1):
    """Every stochastic solver, by name; the second value is the order of its covariance, None if it is not checked."""
    at = dict(churn=churn, s_tmin=0.05, s_tmax=5.0)
    return {
        "euler_ancestral": (solvers.euler_ancestral(), 1),
        "euler_ancestral flow": (solvers.euler_ancestral(by="flow"), 1),
        "euler_churn": (solvers.euler_churn(path, **at), 1),
        "euler_churn late": (solvers.euler_churn(path, late=True, **at), 1),
        "heun_churn": (solvers.heun_churn(path, **at), 2),
        "dpm2_ancestral": (solvers.dpm2_ancestral(path), 2),
        "dpmpp_2s_ancestral": (solvers.dpmpp_2s_ancestral(path), 2),
        "dpmpp_sde": (solvers.dpmpp_sde(path), 2),
        "dpmpp_2m_sde": (solvers.dpmpp_2m_sde(), 2),
        "dpmpp_2m_sde heun": (solvers.dpmpp_2m_sde(kind="heun"), 2),
        "dpmpp_3m_sde": (solvers.dpmpp_3m_sde(), 2),
        "dpmpp_3m_sde ode": (solvers.dpmpp_3m_sde(eta=0.0), 2),
        "dpmpp_3m_sde diffusers": (solvers.dpmpp_3m_sde(form="diffusers"), 1),
        "sa_solver": (solvers.sa_solver(), 2),
        "sa_solver ode": (solvers.sa_solver(3, 3, tau=0.0), 2),
        "restart": (solvers.restart(), None),
    }


def laws(path, named, points):
    """{solver: mean, covariance} at the end of the grid, begun with the law of the data's x there."""
    steps, dtype = len(points.t) - 1, points.alpha.dtype
    alpha, sigma = float(points.alpha[0]), float(points.sigma[0])
    rows = 3 + 4 * steps  # nothing, both channels of x_T, both channels of two noises a step
    x_T = np.zeros((rows, 2))
    x_T[1:3] = np.linalg.cholesky(alpha**2 * COV + sigma**2 * EYE).T
    x_T += alpha * MEAN
    z = np.zeros((steps, 2, rows, 2))
    z.reshape(2 * steps, rows, 2)[
        np.arange(2 * steps).repeat(2), 3 + np.arange(4 * steps), np.arange(4 * steps) % 2
    ] = 1
    denoise = gaussian(path, MEAN, COV)

    @jax.jit
    def walk(points, x, z):
        def end(name):
            source = z if name == "dpmpp_sde" else z[:, 0]
            return samplers.sample(denoise, named[name], points, x, source, NO_COND)[0]

        return {name: end(name) for name in named}

    out = {}
    for name, x in walk(points, jnp.asarray(x_T, dtype), jnp.asarray(z, dtype)).items():
        x = np.asarray(x, float)
        weights = x[1:] - x[0]
        out[name] = x[0], weights.T @ weights
    return out


def between(path, steps):
    """Equal steps of lambda between two levels that all paths have."""
    t = path.time_of(jnp.linspace(-2.6, 3.5, steps + 1, dtype=float))
    return Point(t, path.alpha(t), path.sigma(t))


def test_covariances_converge_at_their_order_and_alike_on_every_path():
    """To those of the data at the last level; sigma / alpha are the same on all paths, so x / alpha is as well."""
    with jax.enable_x64(True):
        errors, coarse = [], None
        for n in (N, 2 * N):
            path = PATHS["rectified_flow"]
            points = between(path, n)
            named = {k: s for k, (s, order) in made(path, 2.4 / n).items() if order}
            alpha, sigma = float(points.alpha[-1]), float(points.sigma[-1])
            found = laws(path, named, points)
            coarse = coarse or {k: v[1] / alpha**2 for k, v in found.items()}
            want = alpha**2 * COV + sigma**2 * EYE
            errors.append({k: np.abs(v[1] - want).max() for k, v in found.items()})
            for name, (mean, _) in found.items():
                np.testing.assert_allclose(mean, alpha * MEAN, atol=1e-6, err_msg=name)
        for name, (_, order) in made(path).items():
            if order:
                slope = np.log2(errors[0][name] / errors[1][name])
                print(f"{name:24s} {errors[0][name]:.1e} {errors[1][name]:.1e} {slope:.2f}")
                assert order - 0.35 < slope < order + 1.6, name
                assert errors[1][name] < (0.1 if order == 1 else 0.02), name
        for other in ("edm",):
            path = PATHS[other]
            points = between(path, N)
            # Heun's trapezoid is in a path's own alpha and sigma; variants differ in weights alone.
            alike = [k for k, (_, order) in made(path).items() if order and " " not in k]
            of = made(path, 2.4 / N)
            named = {k: of[k][0] for k in alike if k != "heun_churn"}
            for name, (_, cov) in laws(path, named, points).items():
                got = cov / float(points.alpha[-1]) ** 2
                np.testing.assert_allclose(got, coarse[name], rtol=3e-4, err_msg=f"{other} {name}")


MIXTURE = Mixture([0.3, 0.7], [-1.0, 1.0], [0.25, 0.4])


@pytest.mark.parametrize("name", ["rectified_flow", "edm", "scaled_linear"])
def test_weights_of_a_mixture_from_noise_to_data(name):
    """From pure noise to clean data, within Monte-Carlo error and what is left of the steps."""
    path, n = PATHS[name], 20000
    points = grids.grid(path, 40, "karras", sigma_min=0.02)
    restarted = grids.grid(path, 40, "karras", sigma_min=0.02, restarts=((0.1, 1.0, 8, 2),))
    denoise = MIXTURE.denoiser(path)
    x_T = samplers.initial_noise(points, KEY, (n, 1))

    @jax.jit
    def walk(points, restarted, x):
        def end(name, solver):
            at = restarted if name == "restart" else points
            return samplers.sample(denoise, solver, at, x, KEY, NO_COND)[0]

        of = made(path, 0.05)
        keep = [k for k, (_, order) in of.items() if order == 2 or k == "restart"]
        keep = keep if name == "rectified_flow" else ["dpmpp_2m_sde", "heun_churn"]
        return {k: end(k, of[k][0]) for k in keep if " " not in k}

    want = 0.3  # the clusters hardly overlap
    mean, second = 0.4, 0.3 * (1 + 0.25**2) + 0.7 * (1 + 0.4**2)
    for solver, x in walk(points, restarted, x_T).items():
        x = np.asarray(x)[:, 0]
        assert np.isfinite(x).all(), solver
        share, width = np.mean(x < -0.2), x[x > 0.2].std()
        print(f"{solver:20s} {share:.3f} {x.mean():.3f} {np.mean(x**2):.3f} {width:.3f}")
        assert share == pytest.approx(want, abs=0.016), solver
        assert x.mean() == pytest.approx(mean, abs=0.035), solver
        assert np.mean(x**2) == pytest.approx(second, abs=0.04), solver


def test_without_noise_they_are_the_deterministic_solvers():
    path = PATHS["cosine"]
    denoise, points = gaussian(path, MEAN, COV), samplers.grid(path, 9)
    x_T = jax.random.normal(KEY, (4, 2))
    pairs = {
        "euler_ancestral": (solvers.euler_ancestral(0.0), solvers.euler()),
        "euler_ancestral flow": (solvers.euler_ancestral(0.0, by="flow"), solvers.euler()),
        "euler_ancestral 0.7": (solvers.euler_ancestral(0.7), solvers.ddim(0.7)),
        "euler_churn": (solvers.euler_churn(path, 0.0), solvers.euler()),
        "euler_churn late": (solvers.euler_churn(path, 0.0, late=True), solvers.euler()),
        "out of range": (solvers.euler_churn(path, 0.3, s_tmin=1e6), solvers.euler()),
        "heun_churn": (solvers.heun_churn(path, 0.0), solvers.heun()),
        "restart": (solvers.restart(), solvers.heun()),
        "dpmpp_2m_sde": (solvers.dpmpp_2m_sde(0.0), solvers.dpmpp_2m()),
        "sa_solver": (solvers.sa_solver(1, 0, tau=0.0), solvers.euler()),
        "sa_solver window": (
            solvers.sa_solver(2, 0, tau=1.0, begin=-1.0),
            solvers.sa_solver(2, 0, 0.0),
        ),
        "tcd": (solvers.tcd(path, 0.0), solvers.euler()),
    }

    @jax.jit
    def walk(points, x):
        return {
            name: [samplers.sample(denoise, s, points, x, KEY, NO_COND)[0] for s in pair]
            for name, pair in pairs.items()
        }

    for name, (a, b) in walk(points, x_T).items():
        np.testing.assert_allclose(a, b, atol=2e-5, err_msg=name)


@pytest.mark.parametrize(("name", "steps"), [("rectified_flow", 1), ("zero_snr", 3)])
def test_few_steps_make_no_nan_and_values_per_sample_are_those_alone(name, steps):
    """From pure noise to clean data; eta, churn and seeds are one a sample."""
    path = PATHS[name]
    denoise, points = gaussian(path, MEAN, COV), samplers.grid(path, steps)
    keys, value = jax.random.split(KEY, 3), jnp.array([0.0, 0.5, 1.0])
    x_T = samplers.initial_noise(points, keys, (3, 5, 2))

    def named(v):
        return {
            "euler_ancestral": solvers.euler_ancestral(v),
            "euler_churn": solvers.euler_churn(path, v),
            "late": solvers.euler_churn(path, v, late=True),
            "heun_churn": solvers.heun_churn(path, v),
            "dpm2_ancestral": solvers.dpm2_ancestral(path, v),
            "dpmpp_2s_ancestral": solvers.dpmpp_2s_ancestral(path, v),
            "dpmpp_sde": solvers.dpmpp_sde(path, v, v),
            "dpmpp_3m_sde": solvers.dpmpp_3m_sde(v),
            "sa_solver": solvers.sa_solver(3, 3, v),
            "restart": solvers.restart(),
            "lcm": solvers.lcm(),
            "tcd": solvers.tcd(path, v),
        }

    @jax.jit
    def walk(v, x, key):
        return {
            k: samplers.sample(denoise, s, points, x, key, NO_COND)[0] for k, s in named(v).items()
        }

    together = walk(value, x_T, keys)
    alone = walk(
        value[1:2].repeat(3), x_T, keys
    )  # the same program: the middle one has its own value
    for solver, x in together.items():
        assert np.isfinite(x).all(), solver
        np.testing.assert_allclose(x[1], alone[solver][1], atol=1e-5, err_msg=solver)


def test_values_compile_nothing_and_programs_do_not_grow_with_the_steps():
    path = PATHS["rectified_flow"]
    denoise = gaussian(path, MEAN, COV)

    def draw(points, eta, churn, gamma, key):
        x = samplers.initial_noise(points, key, (2, 2))
        of = [
            solvers.euler_ancestral(eta),
            solvers.heun_churn(path, churn, churn, 10 * churn),
            solvers.sa_solver(2, 2, eta, 1 - churn, churn),
            solvers.tcd(path, gamma),
            solvers.restart(),
        ]
        return [samplers.sample(denoise, s, points, x, key, NO_COND)[0] for s in of]

    jitted = jax.jit(draw)
    jitted(grids.grid(path, 4), 0.5, 0.1, 0.3, KEY)
    jitted(grids.grid(path, 4, "karras"), 1.0, 0.2, 0.5, jax.random.key(3))
    jitted(grids.grid(path, 4, "beta", shift=3.0), 0.0, 0.0, 0.0, jax.random.key(4))
    assert jitted._cache_size() == 1
    short, long = (
        str(jax.make_jaxpr(draw)(grids.grid(path, n), 0.5, 0.1, 0.3, KEY)).count("\n")
        for n in (4, 50)
    )
    assert short == long


def test_consistency_sampling_has_the_law_of_the_data_in_any_number_of_steps():
    """With a network that knows where the flow ends; the mean of x0, as others predict it, is too narrow."""
    path = PATHS["rectified_flow"]

    def consistency(x_t, t, cond):
        alpha, sigma = path.alpha(t)[:, None], path.sigma(t)[:, None]
        scale = 0.6 / jnp.sqrt((alpha * 0.6) ** 2 + sigma**2)
        x0 = 0.5 + scale * (x_t - alpha * 0.5)
        return Prediction(x0, (x_t - alpha * x0) / sigma)

    x_T = jax.random.normal(KEY, (40000, 1))
    for steps in (1, 4):
        x, _ = run(consistency, solvers.lcm(), samplers.grid(path, steps), x_T)
        assert float(x.mean()) == pytest.approx(0.5, abs=0.015)
        assert float(x.std()) == pytest.approx(0.6, rel=0.02)
    x, _ = run(consistency, solvers.tcd(path, 1.0), samplers.grid(path, 4), x_T)
    assert float(x.std()) == pytest.approx(0.6, rel=0.02)


def test_network_calls_a_step():
    """As the table in `solvers` says, counted while running; restart's way up asks nothing."""
    path = PATHS["rectified_flow"]
    points = grids.grid(path, 7)
    again = grids.grid(path, 7, restarts=((0.2, 0.6, 3, 2),))
    assert len(again.t) == 8 + 2 * 4
    cases = {"heun_churn": 13, "dpm2_ancestral": 12, "dpmpp_2s_ancestral": 12, "dpmpp_sde": 12}
    cases |= {"sa_solver": 7, "restart": 2 * (7 + 2 * 3) - 1}
    counts = {name: [] for name in cases}

    def counting(name):
        def denoise(x, t, cond):
            jax.debug.callback(lambda: counts[name].append(1))
            return Prediction(x, x)

        return denoise

    @jax.jit
    def walk(points, again, x):
        def end(name):
            at = again if name == "restart" else points
            solver = solvers.make(name, path)
            return samplers.sample(counting(name), solver, at, x, KEY, NO_COND)[0]

        return [end(name) for name in cases]

    jax.block_until_ready(walk(points, again, jnp.ones((1, 2))))
    jax.effects_barrier()
    assert {name: len(count) for name, count in counts.items()} == cases


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: solvers.euler_ancestral(by="sigma"), "there is no by='sigma'; the choices are"),
        (lambda: solvers.dpmpp_2m_sde(kind="euler"), "the choices are 'midpoint' and 'heun'"),
        (lambda: solvers.dpmpp_3m_sde(form="x"), "there is no form='x'"),
        (lambda: solvers.sa_solver(5, 1), "predictor=5 must be of 1 to 4"),
        (lambda: solvers.restart("ddim"), "there is no down='ddim' for restart"),
        (lambda: solvers.make("tcd", PATHS["edm"], eta=1.0), "has no option 'eta'; its options"),
    ],
)
def test_bad_options_raise_one_clear_sentence(act, message):
    with pytest.raises(ValueError, match=message):
        act()


def test_two_noises_must_be_given_to_a_solver_that_draws_twice():
    path = PATHS["edm"]
    points, x = samplers.grid(path, 2), jnp.ones((3, 2))
    with pytest.raises(ValueError, match=r"draws twice a step: noise of shape \(2, 3, 2\)"):
        run(gaussian(path, MEAN, COV), solvers.dpmpp_sde(path), points, x, jnp.ones((2, 3, 2)))
