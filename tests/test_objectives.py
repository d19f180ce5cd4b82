import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from ldm_jax.diffusion import objectives, paths, process, targets, times, weightings
from tests.exact import NO_COND, PATHS

KEY = jax.random.key(0)
T = jnp.array([0.02, 0.3, 0.5, 0.7, 0.98])


def snr(path):
    return np.asarray(path.alpha(T) ** 2 / path.sigma(T) ** 2, float)


def test_times_stay_on_the_path_and_off_clean_data():
    for name, path in (PATHS | {"stopped": paths.rectified_flow(t_max=0.9)}).items():
        samplers = [
            times.uniform(path),
            times.stratified(path),
            times.logit_normal(path),
            times.log_normal(path),
        ]
        for sampler in samplers:
            t = sampler(KEY, 5000)
            assert t.shape == (5000,)
            assert t.dtype == jnp.float32
            assert float(t.max()) <= path.t_max, name
            assert float(path.sigma(t).min()) > 0, name


def test_uniform_and_stratified_times_are_uniform_and_the_latter_evenly_spread():
    path = paths.cosine()
    t = np.sort(times.uniform(path)(KEY, 20000))
    assert np.abs(t - (np.arange(20000) + 0.5) / 20000).max() < 0.02  # Kolmogorov-Smirnov
    even = np.sort(times.stratified(path)(KEY, 64))
    np.testing.assert_allclose(np.diff(even), 1 / 64, atol=1e-5)
    assert not np.allclose(even, np.sort(times.stratified(path)(jax.random.key(1), 64)))


def test_discrete_times_are_the_entries_of_the_table():
    path = PATHS["scaled_linear"]
    i = np.asarray(targets.eps().c_time(path, times.discrete(path)(KEY, 20000)))
    np.testing.assert_array_equal(i, np.round(i))
    assert (i.min(), i.max()) == (0, 999)
    assert i.mean() == pytest.approx(499.5, abs=8)
    with pytest.raises(ValueError, match="this path has none"):
        times.discrete(paths.cosine())


def test_logit_normal_times():
    t = np.asarray(times.logit_normal(paths.rectified_flow(), -0.5, 0.8)(KEY, 20000), float)
    z = np.log(t / (1 - t))
    assert (z.mean(), z.std()) == (pytest.approx(-0.5, abs=0.02), pytest.approx(0.8, abs=0.02))


@pytest.mark.parametrize("name", ["edm", "cosine", "scaled_linear"])
def test_log_normal_noise_levels_on_every_path(name):
    path = PATHS[name]
    t = times.log_normal(path, -0.7, 0.5)(KEY, 20000)
    level = np.log(np.asarray(path.sigma(t) / path.alpha(t), float))
    assert (level.mean(), level.std()) == (
        pytest.approx(-0.7, abs=0.02),
        pytest.approx(0.5, abs=0.02),
    )


@pytest.mark.parametrize("name", ["scaled_linear", "cosine"])
def test_min_snr_weights_are_those_of_hang_et_al(name):
    """min(SNR, gamma) for x0, / SNR for eps, / (SNR + 1) for v on a variance-preserving path."""
    path, gamma = PATHS[name], 5.0
    s = snr(path)
    clipped = np.minimum(s, gamma)
    wanted = {targets.x0(): clipped, targets.eps(): clipped / s, targets.v(): clipped / (s + 1)}
    for target, want in wanted.items():
        np.testing.assert_allclose(weightings.min_snr(gamma)(path, target, T), want, rtol=1e-4)


def test_soft_min_snr_has_the_limits_of_min_snr():
    path, gamma = PATHS["cosine"], 4.0
    s = snr(path)
    got = weightings.soft_min_snr(gamma)(path, targets.x0(), T)
    np.testing.assert_allclose(got, s * gamma / (s + gamma), rtol=1e-4)
    assert float(got[0]) == pytest.approx(gamma, rel=0.01)
    assert float(got[-1]) == pytest.approx(float(s[-1]), rel=0.01)


def test_edm_weights_are_those_of_karras():
    path, s = paths.edm(), 0.5
    weight = weightings.edm(s)
    np.testing.assert_allclose(weight(path, targets.edm(s), T), 1.0, rtol=1e-4)
    sigma = np.asarray(path.sigma(T), float)
    np.testing.assert_allclose(
        weight(path, targets.x0(), T), (sigma**2 + s**2) / (sigma * s) ** 2, rtol=1e-4
    )


@pytest.mark.parametrize("name", PATHS)
def test_a_weighting_means_the_same_for_every_target(name):
    """weight ||F_hat - F||^2 depends on the error of x0 alone: the same network error, read by two targets."""
    path = PATHS[name]
    x0, eps, wrong = jax.random.normal(KEY, (3, len(T), 6))
    x_t = process.add_noise(path, x0, eps, T)
    wrong_eps = (x_t - process.over(path.alpha(T), x_t) * wrong) / process.over(path.sigma(T), x_t)
    for weight in (weightings.min_snr(), weightings.soft_min_snr(), weightings.edm()):
        losses = []
        for target in (targets.x0(), targets.v(), targets.flow(), targets.edm()):
            error = process.target_of(path, target, x0 - wrong, eps - wrong_eps, T)
            losses.append(weight(path, target, T) * (error**2).mean(-1))
        np.testing.assert_allclose(losses, np.broadcast_to(losses[0], (4, len(T))), rtol=2e-3)


def test_weights_are_finite_at_both_ends():
    for name, path in PATHS.items():
        t = jnp.array([1e-5, path.t_max])
        for weight in (
            weightings.uniform(),
            weightings.min_snr(),
            weightings.soft_min_snr(),
            weightings.edm(),
        ):
            for target in (targets.x0(), targets.v(), targets.flow(), targets.edm()):
                assert np.isfinite(weight(path, target, t)).all(), name


def constant_loss(
    kind="l2", weight=None, offset_noise=0.0, network=lambda x, t, c: jnp.zeros_like(x)
):
    path = paths.rectified_flow()
    weight = weight or weightings.uniform()
    return jax.jit(
        objectives.diffusion_loss(
            network, path, targets.flow(), times.uniform(path), weight, kind, offset_noise
        )
    )


def test_the_loss_of_a_network_that_says_nothing():
    """F = eps - x0 ~ N(0, 2) for data N(0, 1): E F^2 = 2, E |F| = sqrt(4 / pi)."""
    x0 = jax.random.normal(jax.random.key(5), (512, 8, 8, 2))
    for kind, want in (("l2", 2.0), ("l1", (4 / np.pi) ** 0.5)):
        value, parts = constant_loss(kind)(KEY, x0, NO_COND)
        assert float(value) == pytest.approx(want, rel=0.01)
        assert parts["loss_per_sample"].shape == parts["t"].shape == (512,)
        assert float(parts["loss_per_sample"].mean()) == pytest.approx(float(value), rel=1e-5)


def test_the_weight_enters_the_loss_but_not_the_losses_per_sample():
    x0 = jnp.ones((16, 4, 1))
    weight = weightings.min_snr()
    (plain, a), (weighted, b) = (constant_loss(weight=w)(KEY, x0, NO_COND) for w in (None, weight))
    np.testing.assert_array_equal(a["loss_per_sample"], b["loss_per_sample"])
    w = weight(paths.rectified_flow(), targets.flow(), b["t"])
    assert float(weighted) == pytest.approx(float((w * b["loss_per_sample"]).mean()), rel=1e-5)
    assert float(weighted) != pytest.approx(float(plain), rel=0.01)


@pytest.mark.parametrize("name", ["scaled_linear", "cosine", "rectified_flow", "edm"])
def test_the_best_network_for_gaussian_data_reaches_the_analytic_loss(name):
    """x0 ~ N(0, s^2): min E (F_hat - F)^2 = Var(F | x_t) = s^2 D^2 / (alpha^2 s^2 + sigma^2), at every t."""
    path, s, target = PATHS[name], 0.5, targets.edm(0.8)

    def best(path, t):
        """E[F | x_t] / x_t = cov(F, x_t) / var(x_t)"""
        alpha, sigma = path.alpha(t), path.sigma(t)
        a, b = target.row(path, t)
        return (a * alpha * s**2 + b * sigma) / (alpha**2 * s**2 + sigma**2)

    t = jnp.full(64, 0.4)

    def network(x, c_time, cond):
        return process.over(best(path, t) / target.c_in(path, t), x) * x

    loss = objectives.diffusion_loss(network, path, target, lambda rng, b: t, weightings.uniform())
    x0 = s * jax.random.normal(jax.random.key(5), (64, 16, 16))
    alpha, sigma = path.alpha(t)[0], path.sigma(t)[0]
    want = s**2 * process.determinant(path, target, t)[0] ** 2 / (alpha**2 * s**2 + sigma**2)
    value, _ = jax.jit(loss)(KEY, x0, NO_COND)
    assert float(value) == pytest.approx(float(want), rel=0.04)


def test_offset_noise_is_constant_over_space():
    """It adds its variance to the loss, and the mean over space of F keeps it."""
    x0 = jnp.zeros((256, 16, 16, 3))
    plain, offset = (float(constant_loss(offset_noise=o)(KEY, x0, NO_COND)[0]) for o in (0.0, 0.5))
    assert offset - plain == pytest.approx(0.25, rel=0.15)

    # A network of F = x_t / t = eps, but for the mean over space: the loss that is left is that of the means.
    def network(x, t, cond):
        eps = x / process.over(t / 1000, x)
        return eps - eps.mean((1, 2), keepdims=True)

    value, _ = constant_loss(offset_noise=0.5, network=network)(KEY, x0, NO_COND)
    assert float(value) ** 0.5 == pytest.approx((0.25 + 1 / 256) ** 0.5, rel=0.1)


def test_the_same_key_gives_the_same_loss_and_gradients_flow():
    x0 = jax.random.normal(KEY, (4, 6))

    def value(scale):
        return constant_loss(network=lambda x, t, c: scale * x)(KEY, x0, NO_COND)[0]

    assert value(0.3) == value(0.3)
    assert float(jax.grad(value)(0.3)) == pytest.approx(
        float((value(0.31) - value(0.29)) / 0.02), rel=1e-2
    )


def test_data_in_half_precision_lose_nothing_but_their_own_rounding():
    x0 = jax.random.normal(KEY, (4, 6)).astype(jnp.bfloat16)
    value, parts = constant_loss()(KEY, x0, NO_COND)
    want, _ = constant_loss()(KEY, x0.astype(jnp.float32), NO_COND)
    assert value == want
    assert parts["loss_per_sample"].dtype == jnp.float32


def test_bin_means():
    losses, t = jnp.array([1.0, 3.0, 5.0, 7.0]), jnp.array([0.0, 0.2, 0.6, 1.0])
    np.testing.assert_array_equal(objectives.bin_means(losses, t, 4), [2.0, np.nan, 5.0, 7.0])


def test_bad_settings_raise_one_clear_sentence():
    path = paths.rectified_flow()
    rest = (times.uniform(path), weightings.uniform())
    with pytest.raises(ValueError, match="divides by alpha"):
        objectives.diffusion_loss(lambda x, t, c: x, path, targets.eps(), *rest)
    for factory in (weightings.min_snr, weightings.soft_min_snr, weightings.edm):
        with pytest.raises(ValueError, match="must be positive"):
            factory(0.0)


def test_the_normal_distribution_here_is_scipys():
    """Guards the tests above against a wrong assumption on E |F|."""
    assert norm.expect(abs, scale=2**0.5) == pytest.approx((4 / np.pi) ** 0.5, rel=1e-6)
