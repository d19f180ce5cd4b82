import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from ldm_jax.diffusion import bound, samplers
from ldm_jax.types import Prediction
from tests.exact import NO_COND, PATHS, gaussian

KEY = jax.random.key(0)
S = 0.6  # the data are N(0, S^2)
ENTROPY = 0.5 * np.log2(2 * np.pi * np.e * S**2)  # bits per dimension


def expected(points):
    """The bound of the exact denoiser, whose mse is S^2 / (1 + S^2 SNR), by closed forms in float64."""
    alpha, sigma = (np.asarray(a, float)[:-1] for a in (points.alpha, points.sigma))
    snr = (alpha / sigma) ** 2
    mse = S**2 / (1 + S**2 * snr)
    wide = alpha[0] ** 2 + sigma[0] ** 2
    prior = 0.5 * (np.log(wide / sigma[0] ** 2) + (sigma[0] ** 2 + alpha[0] ** 2 * S**2) / wide - 1)
    transitions = 0.5 * np.diff(snr) * mse[:-1]
    decoder = 0.5 * np.log(2 * np.pi / snr[-1]) + 0.5 * mse[-1] * snr[-1]
    return np.array([prior, *transitions, decoder]) / np.log(2)


def evaluate(denoise, decoder=None, **kwargs):
    decoder = decoder or bound.continuous()
    return jax.jit(
        lambda points, x0: bound.bits_per_dim(
            denoise, points, x0, jax.random.key(1), NO_COND, decoder, **kwargs
        )
    )


def measured(path, points, **kwargs):
    x0 = jax.random.normal(KEY, (64, 16, 16, 1))
    x0 *= S / jnp.sqrt(
        jnp.square(x0).mean()
    )  # the sample's own variance would be most of the error
    denoise = gaussian(path, np.zeros(1, np.float32), np.full((1, 1), S**2, np.float32))
    return evaluate(denoise, **kwargs)(points, x0)


GRIDS = {
    "ddpm_table": (PATHS["linear"], 1000, "linspace"),
    "cosine": (PATHS["cosine"], 200, "karras"),
    "rectified_flow": (PATHS["rectified_flow"], 200, "log_snr"),
    "edm": (PATHS["edm"], 200, "uniform"),
}


@pytest.mark.parametrize("name", GRIDS)
def test_every_term_is_its_closed_form_on_gaussian_data(name):
    path, n, spacing = GRIDS[name]
    points = samplers.grid(path, n, spacing)
    got, want = measured(path, points), expected(points)
    assert got.transitions.shape == (n - 1, 64)
    assert float(got.prior.mean()) == pytest.approx(want[0], abs=2e-4)
    np.testing.assert_allclose(got.transitions.mean(1), want[1:-1], rtol=0.06, atol=1e-5)
    assert float(got.decoder.mean()) == pytest.approx(want[-1], abs=0.02)
    assert float(got.total.mean()) == pytest.approx(want.sum(), abs=0.02)
    np.testing.assert_allclose(
        got.total, got.prior + got.transitions.sum(0) + got.decoder, rtol=1e-5
    )


def test_the_bound_approaches_the_entropy_as_the_steps_grow():
    path, gaps = PATHS["cosine"], []
    for steps in (50, 100, 200, 400):
        points = samplers.grid(path, steps, "log_snr", sigma_min=0.02)
        gaps.append(expected(points).sum() - ENTROPY)
    assert gaps[-1] > 0
    np.testing.assert_allclose(
        np.divide(gaps[1:], gaps[:-1]), 0.5, atol=0.05
    )  # first order in the step
    assert float(measured(path, points).total.mean()) == pytest.approx(ENTROPY + gaps[-1], abs=0.01)


def test_a_wrong_denoiser_has_a_larger_bound():
    path = PATHS["cosine"]
    points = samplers.grid(path, 50, "karras")
    x0 = S * jax.random.normal(KEY, (16, 64, 1))
    totals = []
    for variance in (S**2, 0.3 * S**2, 3 * S**2):
        denoise = gaussian(path, np.zeros(1, np.float32), np.full((1, 1), variance, np.float32))
        totals.append(float(evaluate(denoise)(points, x0).total.mean()))
    assert totals[0] < min(totals[1:]) - 0.01


def test_large_variance_costs_the_divergence_of_the_variances():
    """KL(N(m, v) || N(m', w)) = (v / w - 1 - log(v / w)) / 2 + (v / w) KL of equal variances."""
    path = PATHS["linear"]
    points = samplers.grid(path, 50, "linspace")
    small, large = (
        np.asarray(measured(path, points, variance=v).transitions.mean(1))
        for v in ("small", "large")
    )
    sigma = np.asarray(points.sigma, float)
    p, q = slice(0, 49), slice(1, 50)
    ratio = (sigma[q] / sigma[p]) ** 2  # posterior variance over that of the noising step
    want = (ratio - 1 - np.log(ratio)) / 2 / np.log(2) + ratio * small
    np.testing.assert_allclose(large, want, rtol=1e-3, atol=1e-5)
    assert (large > small).sum() > 0


def test_gaussian_kl_is_the_integral():
    x = np.linspace(-30, 30, 200001)
    for m1, v1, m2, v2 in ((0.0, 1.0, 0.5, 2.0), (1.0, 0.3, -1.0, 0.2)):
        p, q = norm(m1, v1**0.5), norm(m2, v2**0.5)
        want = np.trapezoid(p.pdf(x) * (p.logpdf(x) - q.logpdf(x)), x)
        assert float(bound.gaussian_kl(*map(jnp.float32, (m1, v1, m2, v2)))) == pytest.approx(
            want, rel=1e-4
        )


@pytest.mark.parametrize("std", [0.002, 0.02, 0.5, 5.0])
def test_the_discretised_decoder_is_a_distribution_over_the_256_values(std):
    values = np.arange(256) / 127.5 - 1
    x = jnp.asarray(values, jnp.float32)[None, :, None]
    nll = jax.jit(bound.discretised())
    for mean in (-1.0, 0.1, 0.97):
        got = np.asarray(nll(x, jnp.full_like(x, mean), jnp.float32(std)), float).ravel()
        assert np.exp(-got).sum() == pytest.approx(1.0, abs=2e-3)
        edges = np.concatenate([[-np.inf], values[:-1] + 1 / 255, [np.inf]])
        want = np.diff(norm.cdf(edges, mean, std))
        near = want > 1e-12
        np.testing.assert_allclose(got[near], -np.log(want[near]), rtol=2e-3, atol=2e-3)


def test_the_discretised_decoder_stays_finite_far_from_the_mean():
    x = jnp.array([[-1.0], [-0.5], [0.5], [1.0]])
    got = bound.discretised()(x, -x, jnp.float32(0.01))
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got[0], got[3], rtol=1e-5)
    np.testing.assert_allclose(got[1], got[2], rtol=1e-5)


def test_a_model_that_knows_the_image_pays_for_the_last_level_only():
    """With a denoiser that returns the data, all that is left is the prior and the decoder's own width."""
    path = PATHS["linear"]
    x0 = jnp.round(jax.random.uniform(KEY, (4, 8, 8, 3)) * 255) / 127.5 - 1

    def denoise(x_t, t, cond):
        return Prediction(x0, x_t)

    out = evaluate(denoise, bound.discretised())(samplers.grid(path, 100, "linspace"), x0)
    np.testing.assert_allclose(out.transitions, 0.0, atol=1e-6)
    assert float(out.prior.max()) < 1e-3
    # The mass of the centre bin of a normal of standard deviation 0.01: 1/255 either side.
    inner = -np.log2(norm.cdf(1 / 2.55) - norm.cdf(-1 / 2.55))
    assert float(out.decoder.mean()) == pytest.approx(inner, rel=0.02)


def test_a_bad_grid_raises():
    path = PATHS["cosine"]
    with pytest.raises(ValueError, match="at least two steps"):
        bound.bits_per_dim(
            gaussian(path, [0.0], [[1.0]]), samplers.grid(path, 1), jnp.ones((1, 1)), KEY, NO_COND
        )
