import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion import paths, process, targets
from ldm_jax.diffusion.process import Point
from ldm_jax.types import Cond
from tests.exact import NO_COND, PATHS

TARGETS = {
    "eps": targets.eps(),
    "x0": targets.x0(),
    "v": targets.v(),
    "flow": targets.flow(),
    "edm": targets.edm(),
}
T = jnp.array([0.001, 0.1, 0.3, 0.5, 0.7, 0.9, 0.997])


def draws(*shape):
    return jax.random.normal(jax.random.key(0), shape), jax.random.normal(jax.random.key(1), shape)


PATHS_AND_STOPPED = PATHS | {
    "stopped_cosine": paths.cosine(t_max=0.999),
    "stopped_flow": paths.rectified_flow(t_max=0.999),
}


def round_trips(path, x0, eps, t):
    """{target: what is read from a perfect network's output}, for every target that the path allows."""

    def read(target):
        def network(x, c_time, cond):
            return process.target_of(path, target, x0, eps, t)

        x_t = process.add_noise(path, x0, eps, t)
        return process.make_denoiser(network, path, target)(x_t, t, NO_COND)

    pure = float(path.alpha(jnp.array(path.t_max))) == 0
    names = [name for name in TARGETS if not (pure and name == "eps")]
    return jax.jit(lambda: {name: read(TARGETS[name]) for name in names})()


@pytest.mark.parametrize("name", PATHS_AND_STOPPED)
def test_the_prediction_of_a_perfect_network_is_the_data_and_the_noise(name):
    path = PATHS_AND_STOPPED[name]
    x0, eps = draws(len(T), 4, 3, 2)
    alpha, sigma = (process.over(f(T), x0) for f in (path.alpha, path.sigma))
    scale = jnp.sqrt(alpha**2 + sigma**2)
    for got in round_trips(path, x0, eps, T).values():
        # Where alpha (or sigma) is small, x0 (or eps) is known that much less: compare the parts of x_t.
        np.testing.assert_allclose(alpha * got.x0 / scale, alpha * x0 / scale, atol=2e-5)
        np.testing.assert_allclose(sigma * got.eps / scale, sigma * eps / scale, atol=2e-5)


@pytest.mark.parametrize("name", PATHS_AND_STOPPED)
def test_nothing_is_lost_at_the_noisy_end(name):
    x0, eps = draws(2, 5, 1)
    path = PATHS_AND_STOPPED[name]
    for got in round_trips(path, x0, eps, jnp.full(2, path.t_max)).values():
        np.testing.assert_allclose(got.eps, eps, rtol=1e-3, atol=1e-3)
        assert np.isfinite(got.x0).all()


@pytest.mark.parametrize("name", PATHS)
def test_time_of_inverts_the_path(name):
    path = PATHS[name]
    t = jnp.linspace(0.002, 0.998, 41)
    np.testing.assert_allclose(path.time_of(jnp.log(path.alpha(t) / path.sigma(t))), t, atol=2e-5)
    ends = path.time_of(jnp.array([-jnp.inf, jnp.inf]))
    np.testing.assert_allclose(ends, [path.t_max, 0.0], atol=1e-6)


@pytest.mark.parametrize("name", [n for n in PATHS if n != "edm"])
def test_noise_grows_with_time(name):
    path = PATHS[name]
    t = jnp.linspace(0.0, 1.0, 501)
    assert (jnp.diff(path.sigma(t)) >= 0).all()
    assert (jnp.diff(path.alpha(t)) < 0).all()
    if name != "rectified_flow":
        np.testing.assert_allclose(path.alpha(t) ** 2 + path.sigma(t) ** 2, 1.0, atol=1e-6)


def alphas_cumprod(schedule, start, end):
    """Written from Ho et al. 2020, Rombach et al.'s code and Nichol & Dhariwal 2021, one step at a time."""
    out, running = [], 1.0
    for i in range(1000):
        if schedule == "linear":
            beta = start + (end - start) * i / 999
        elif schedule == "scaled_linear":
            beta = (start**0.5 + (end**0.5 - start**0.5) * i / 999) ** 2
        else:
            f = [np.cos(((i + j) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2 for j in (0, 1)]
            beta = min(1 - f[1] / f[0], 0.999)
        running *= 1 - beta
        out.append(running)
    return np.array(out)


@pytest.mark.parametrize(
    ("name", "start", "end"),
    [("linear", 1e-4, 0.02), ("scaled_linear", 0.00085, 0.012), ("squared_cosine", 1e-4, 0.02)],
)
def test_the_tables_are_those_of_the_papers(name, start, end):
    path = paths.ddpm(name, start, end)
    want = alphas_cumprod(name, start, end)
    i = np.arange(1000)
    with jax.enable_x64(True):
        np.testing.assert_allclose(path.alpha(jnp.asarray(i / 999)) ** 2, want, rtol=1e-9)
    t = jnp.asarray(i / 999, jnp.float32)
    np.testing.assert_allclose(path.alpha(t) ** 2, want, rtol=1e-5)
    np.testing.assert_allclose(path.sigma(t) ** 2, 1 - want, rtol=1e-5)
    np.testing.assert_array_equal(targets.eps().c_time(path, t), i)  # exactly


def test_stable_diffusions_noisiest_level():
    """sigma / alpha at its last time is known to be 14.6146 (k-diffusion's sigma_max)."""
    path = PATHS["scaled_linear"]
    assert float(path.sigma(jnp.ones(())) / path.alpha(jnp.ones(()))) == pytest.approx(
        14.6146, abs=1e-3
    )
    assert float(path.sigma(jnp.zeros(())) / path.alpha(jnp.zeros(()))) == pytest.approx(
        0.0292, abs=1e-4
    )


def test_zero_terminal_snr_keeps_the_first_entry_and_ends_in_pure_noise():
    plain, zero = PATHS["scaled_linear"], PATHS["zero_snr"]
    t = jnp.asarray(np.arange(1000) / 999, jnp.float32)
    a, z = plain.alpha(t), zero.alpha(t)
    np.testing.assert_allclose(z, (a - a[-1]) * a[0] / (a[0] - a[-1]), atol=1e-6)
    assert z[-1] == 0
    assert zero.sigma(t)[-1] == 1
    within = zero.alpha(jnp.linspace(998 / 999, 1.0, 7))
    assert (jnp.diff(within) < 0).all()


@pytest.mark.parametrize("path", [PATHS["zero_snr"], paths.cosine(), paths.rectified_flow()])
def test_eps_on_a_path_that_ends_in_pure_noise_raises_also_while_tracing(path):
    with pytest.raises(ValueError, match="divides by alpha, which is 0 at t_max"):
        process.check(path, targets.eps())

    def traced(x):
        return process.make_denoiser(lambda x, t, c: x, path, targets.eps())(x, x[:, 0], NO_COND).x0

    with pytest.raises(ValueError, match="use the target v, x0, flow or edm"):
        jax.jit(traced)(jnp.ones((2, 1)))


def test_edm_is_table_1_of_karras():
    """D(x; sigma) = c_skip x + c_out F(c_in x; c_noise), their functions written out."""
    path, s = paths.edm(), 0.5
    x, f = draws(len(T), 6, 3)
    seen = {}

    def network(x, t, cond):
        seen.update(x=x, t=t)
        return f

    got = process.make_denoiser(network, path, targets.edm(s))(x, T, NO_COND)
    sigma = path.sigma(T)[:, None, None]
    c_skip = s**2 / (sigma**2 + s**2)
    c_out = sigma * s / jnp.sqrt(s**2 + sigma**2)
    np.testing.assert_allclose(got.x0, c_skip * x + c_out * f, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(seen["x"], x / jnp.sqrt(sigma**2 + s**2), rtol=1e-6)
    np.testing.assert_allclose(seen["t"], jnp.log(path.sigma(T)) / 4, rtol=1e-5)


def test_edm_on_a_variance_preserving_path_is_minus_v():
    path, edm = PATHS["cosine"], targets.edm(1.0)
    x0, eps = draws(len(T), 5)
    v = process.target_of(path, targets.v(), x0, eps, T)
    np.testing.assert_allclose(process.target_of(path, edm, x0, eps, T), -v, atol=1e-6)


@pytest.mark.parametrize("name", ["rectified_flow", "cosine", "edm"])
def test_flow_is_the_derivative_of_x_t(name):
    path = PATHS[name]
    x0, eps = draws(len(T), 5)
    with jax.enable_x64(True):
        x0, eps, t, h = (jnp.asarray(np.asarray(a, float)) for a in (x0, eps, T, 1e-6))
        ahead, behind = (process.add_noise(path, x0, eps, t + d) for d in (h, -h))
        got = process.target_of(path, targets.flow(), x0, eps, t)
        np.testing.assert_allclose(got, (ahead - behind) / (2 * h), rtol=1e-5, atol=1e-5)
    if name == "rectified_flow":
        np.testing.assert_allclose(got, eps - x0, atol=1e-6)


def test_what_the_network_reads_as_time():
    assert float(targets.v().c_time(paths.ddpm(steps=50), jnp.ones(()))) == 49
    assert float(targets.flow().c_time(paths.rectified_flow(), jnp.array(0.5))) == 500
    ends = targets.edm().c_time(paths.rectified_flow(), jnp.array([0.0, 1.0]))
    assert np.isfinite(ends).all()


@pytest.mark.parametrize("name", PATHS)
def test_inputs_are_bounded_on_every_path(name):
    path, t = PATHS[name], jnp.linspace(0.0, 1.0, 9)
    x0, eps = draws(9, 4000)
    for target in (targets.v(), targets.edm(1.0)):
        x = process.over(target.c_in(path, t), x0) * process.add_noise(path, x0, eps, t)
        assert 0.6 < float(x.std(-1).min()) <= float(x.std(-1).max()) < 1.1


def brute_force_chain(p, q):
    """The joint Gaussian of (x_p, x_q) given x0 by 2x2 linear algebra in float64, conditioned on x_p."""
    alpha = float(p.alpha / q.alpha)
    step = float(p.sigma) ** 2 - alpha**2 * float(q.sigma) ** 2
    var_q, cov = float(q.sigma) ** 2, alpha * float(q.sigma) ** 2
    var_p = alpha**2 * var_q + step
    gain = cov / var_p
    return alpha, step, float(q.alpha) - gain * float(p.alpha), gain, var_q - gain * cov


@pytest.mark.parametrize("name", PATHS)
def test_the_markov_chain(name):
    path = PATHS[name]
    with jax.enable_x64(True):
        for tp, tq in ((1.0, 0.9), (0.6, 0.5), (0.3, 0.01)):
            p, q = (Point(t, path.alpha(t), path.sigma(t)) for t in map(jnp.asarray, (tp, tq)))
            got = (*process.transition(p, q), *process.posterior(p, q))
            np.testing.assert_allclose(got, brute_force_chain(p, q), rtol=1e-7, atol=1e-12)


def test_the_posterior_to_clean_data_is_the_data():
    p, q = Point(*map(jnp.array, (0.5, 0.8, 0.6))), Point(*map(jnp.array, (0.0, 1.0, 0.0)))
    assert [float(a) for a in process.posterior(p, q)] == [1.0, 0.0, 0.0]


def test_the_denoiser_is_float32_whatever_the_network_computes_in():
    path = paths.rectified_flow()

    def network(x, t, cond):
        return x.astype(jnp.bfloat16)

    got = process.make_denoiser(network, path, targets.flow())(jnp.ones((2, 3)), T[:2], Cond())
    assert {a.dtype for a in got} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("factory", "settings", "message"),
    [
        (paths.ddpm, dict(schedule="sigmoid"), "no schedule 'sigmoid'"),
        (paths.ddpm, dict(beta_start=0.1, beta_end=0.01), "betas must satisfy"),
        (paths.ddpm, dict(steps=2), "at least 3 steps"),
        (paths.cosine, dict(t_max=1.5), "t_max=1.5"),
        (paths.edm, dict(sigma_min=1.0, sigma_max=0.5), "noise levels"),
        (paths.edm, dict(rho=0.5), "rho=0.5"),
        (targets.edm, dict(sigma_data=0.0), "must be positive"),
    ],
)
def test_bad_settings_raise_one_clear_sentence(factory, settings, message):
    with pytest.raises(ValueError, match=message):
        factory(**settings)
