"""The adaptive solver: against exact flows and densities, in both directions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import multivariate_normal

from ldm_jax.diffusion import adaptive
from tests.exact import COV, KEY, MEAN, NO_COND, PATHS, Mixture, gaussian

MIXTURE = Mixture([0.35, 0.65], [-1.2, 0.6], [0.35, 0.5])


@pytest.mark.parametrize("name", ["scaled_linear", "rectified_flow", "edm"])
def test_the_flow_is_exact_up_to_the_tolerance_in_both_directions(name):
    """It keeps quantiles; from the noisy end to almost clean data and back."""
    path, u = PATHS[name], np.linspace(0.05, 0.95, 5)
    denoise, times = MIXTURE.denoiser(path), np.array([1.0, 0.02])

    @jax.jit
    def carry(x, t0, t1, tol):
        return adaptive.integrate(denoise, path, x, t0, t1, NO_COND, tol, tol)

    with jax.enable_x64(True):
        alpha, sigma = (np.asarray(f(jnp.asarray(times))) for f in (path.alpha, path.sigma))
        noisy, clean = (MIXTURE.quantiles(u, a, s) for a, s in zip(alpha, sigma, strict=True))
        there = jnp.asarray(noisy)[None, :, None]
        errors, calls = [], []
        for tol in (1e-4, 1e-6, 1e-8):
            x, count = carry(there, times[0], times[1], tol)
            back, _ = carry(x, times[1], times[0], tol)
            errors.append(np.abs(np.asarray(x)[0, :, 0] - clean).max())
            calls.append(int(count))
            width = np.hypot(alpha[0], sigma[0])
            assert np.abs(back - there).max() / width < 300 * tol
    print(name, errors, calls)
    assert all(e < 100 * tol for e, tol in zip(errors, (1e-4, 1e-6, 1e-8), strict=True))
    assert calls[0] < calls[1] < calls[2] < 1200


def test_samples_have_steps_and_times_of_their_own():
    path = PATHS["rectified_flow"]
    denoise = MIXTURE.denoiser(path)
    x = jax.random.normal(KEY, (3, 4, 1))
    t0, t1 = jnp.array([1.0, 0.9, 0.5]), jnp.array([0.02, 0.1, 0.5])
    carry = jax.jit(lambda x, t0, t1: adaptive.integrate(denoise, path, x, t0, t1, NO_COND))
    together, _ = carry(x, t0, t1)
    for i in range(3):
        alone, _ = carry(*(jnp.stack([a[i]] * 3) for a in (x, t0, t1)))
        np.testing.assert_allclose(alone[0], together[i], atol=1e-5)
    np.testing.assert_allclose(together[2], x[2], atol=1e-6)  # nowhere to go


def test_calls_are_counted_and_a_sample_that_does_not_arrive_is_nan():
    path, count = PATHS["cosine"], []
    exact = gaussian(path, MEAN, COV)

    def denoise(x, t, cond):
        jax.debug.callback(lambda: count.append(1))
        return exact(x, t, cond)

    @jax.jit
    def carry(limit):
        x = jnp.ones((2, 2))
        return adaptive.integrate(denoise, path, x, 1.0, 0.01, NO_COND, limit=limit)

    x, calls = carry(1000)
    jax.block_until_ready(x)
    jax.effects_barrier()
    assert len(count) == calls
    assert np.isfinite(x).all()
    x, calls = carry(2)
    assert calls == 13
    assert np.isnan(x).all()


@pytest.mark.parametrize("name", ["zero_snr", "rectified_flow", "edm"])
def test_likelihood_of_gaussian_data_is_its_density(name):
    path, t0 = PATHS[name], 0.05
    denoise = gaussian(path, MEAN, COV)
    alpha, sigma = (float(f(jnp.float32(t0))) for f in (path.alpha, path.sigma))
    data = multivariate_normal(alpha * MEAN, alpha**2 * COV + sigma**2 * np.eye(2))
    x = data.rvs(6, random_state=0).astype(np.float32)
    # At 80 the mean of the data is 0.5 / 80 standard deviations off the normal end.
    slack = 1e-4 if name != "edm" else 0.03

    @jax.jit
    def both(x, key):
        exact, _ = adaptive.log_likelihood(denoise, path, x, t0, 1.0, NO_COND)
        if name != "rectified_flow":
            return exact, None
        return exact, adaptive.log_likelihood(denoise, path, x, t0, 1.0, NO_COND, key, 64)[0]

    exact, guess = both(jnp.asarray(x), KEY)
    np.testing.assert_allclose(exact, data.logpdf(x), atol=slack)
    if guess is not None:  # its error has a standard deviation of some tenths with 64 probes
        error = np.asarray(guess - exact)
        print(error)
        assert 1e-3 < np.abs(error).max() < 2.0
        assert np.abs(error.mean()) < 0.5


def test_no_probe_is_an_error():
    path = PATHS["edm"]
    with pytest.raises(ValueError, match="at least one probe, not 0"):
        adaptive.log_likelihood(
            gaussian(path, MEAN, COV), path, jnp.ones((1, 2)), 0.1, 1.0, NO_COND, KEY, probes=0
        )
