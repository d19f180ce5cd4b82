"""Grids of noise levels: closed forms, published lists, what a config can say, bad input."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import beta

from ldm_jax.build import sampler
from ldm_jax.diffusion import grids, spacings
from ldm_jax.diffusion.grids import grid
from tests.exact import PATHS

FLOW, EDM, TABLE = PATHS["rectified_flow"], PATHS["edm"], PATHS["scaled_linear"]
EVERYWHERE = ("uniform", "karras", "exponential", "log_snr", "cosine", "beta", "ays")


def ratio(points):
    """sigma / alpha."""
    return np.asarray(points.sigma / np.maximum(points.alpha, 1e-30), float)


@pytest.mark.parametrize("name", ["scaled_linear", "zero_snr", "rectified_flow", "edm"])
def test_every_spacing_falls_from_the_noisy_end_to_clean_data(name):
    path = PATHS[name]
    tables = ("leading", "trailing", "linspace", "lcm") if path.steps else ()
    for spacing, n in itertools.product((*EVERYWHERE, *tables), (1, 9)):
        points = grid(path, n, spacing)
        assert len(points.t) == n + 1
        assert points.sigma[-1] == 0, spacing
        assert (np.diff(ratio(points)) < 0).all(), spacing
        if spacing not in ("leading", "ays"):  # leading begins later, ays where its list does
            assert points.t[0] == path.t_max, spacing


def test_levels_by_their_formulas():
    n, lo, hi = 7, 0.05, 20.0
    i = np.arange(n) / (n - 1)
    least, most = 0.002, 80.0
    want = (most**0.2 + i * (least**0.2 - most**0.2)) ** 5
    np.testing.assert_allclose(ratio(grid(EDM, n, "karras", rho=5.0))[:-1], want, rtol=3e-4)
    log = grid(FLOW, n, "exponential", sigma_min=lo, sigma_max=hi)
    np.testing.assert_allclose(ratio(log)[1:-1], (hi * (lo / hi) ** i)[1:], rtol=1e-4)
    for a, b in zip(log, grid(FLOW, n, "log_snr", sigma_min=lo, sigma_max=hi), strict=True):
        np.testing.assert_array_equal(a, b)
    angles = np.arctan(ratio(grid(TABLE, n, "cosine"))[:-1])
    np.testing.assert_allclose(np.diff(angles, 2), 0, atol=1e-5)
    quantiles = beta.ppf(1 - np.arange(n) / n, 0.6, 0.6)
    np.testing.assert_allclose(grid(FLOW, n, "beta").t[:-1], quantiles, atol=1e-6)
    np.testing.assert_allclose(grid(TABLE, n, "beta").t[:-1], quantiles, atol=1e-6)
    in_sigma = grid(FLOW, n, "karras", of="sigma", sigma_min=0.01)
    want = (1 + i * (0.01 ** (1 / 7) - 1)) ** 7
    np.testing.assert_allclose(in_sigma.sigma[:-1], want, atol=1e-6)
    np.testing.assert_allclose(grid(FLOW, 4, t_min=0.1).t, [1, 0.7, 0.4, 0.1, 0], atol=1e-6)
    assert round(float(grid(TABLE, 5, "linspace", extra=True).t[4] * 999)) == 200
    assert [round(float(t) * 999) for t in grid(TABLE, 4, "lcm").t] == [999, 759, 499, 259, 0]


@pytest.mark.parametrize(("model", "path"), [("sd1", "scaled_linear"), ("sdxl", "rectified_flow")])
def test_align_your_steps_is_the_published_list_and_log_linear_between(model, path):
    listed = np.array(spacings.AYS[model])
    path = PATHS[path]
    np.testing.assert_allclose(
        ratio(grid(path, 10, "ays", model=model))[:-1], listed[:-1], rtol=1e-4
    )
    twice = ratio(grid(path, 20, "ays", model=model))
    np.testing.assert_allclose(twice[:-1:2], listed[:-1], rtol=1e-4)
    np.testing.assert_allclose(twice[1::2], np.sqrt(listed[1:] * listed[:-1]), rtol=1e-4)


def test_shift_and_its_resolution():
    """Esser et al. 2024: t' = s t / (1 + (s - 1) t), and FLUX' mu of 0.5 to 1.15 for 256 to 4096 tokens."""
    t = np.linspace(1, 0, 9)
    np.testing.assert_allclose(grid(FLOW, 8, shift=3.0).t, 3 * t / (1 + 2 * t), atol=1e-6)
    assert grids.resolution_shift(256) == pytest.approx(math.exp(0.5))
    assert grids.resolution_shift(4096) == pytest.approx(math.exp(1.15))
    assert grids.resolution_shift(2176, form="linear") == pytest.approx(0.825)
    shifted = grid(FLOW, 8, shift=dict(tokens=4096), terminal=0.1)
    assert float(shifted.t[-2]) == pytest.approx(0.1, abs=1e-6)
    assert float(shifted.t[0]) == 1.0


def test_a_list_of_the_user():
    want = grid(TABLE, 3, "list", entries=(999, 500, 20))
    np.testing.assert_allclose(want.t * 999, [999, 500, 20, 0], atol=1e-3)
    same = grid(TABLE, 3, "list", ratios=tuple(ratio(want)[:-1]))
    np.testing.assert_allclose(same.t, want.t, atol=1e-5)
    ended = grid(TABLE, 2, "list", to_zero=False, times=(0.9, 0.4, 0.1))
    np.testing.assert_allclose(ended.t, [0.9, 0.4, 0.1], atol=1e-6)
    assert ended.sigma[-1] > 0.1


def test_restarts_go_back_up():
    plain = grid(EDM, 8)
    points = grid(EDM, 8, restarts=((0.3, 2.0, 2, 3),))
    at = int(np.argmin(np.abs(np.log(ratio(plain)[1:-1] / 0.3)))) + 1
    bottom = ratio(plain)[at]
    loop = [2.0, ((2 ** (1 / 7) + bottom ** (1 / 7)) / 2) ** 7, bottom] * 3
    want = [*ratio(plain)[: at + 1], *loop, *ratio(plain)[at + 1 :]]
    np.testing.assert_allclose(ratio(points), want, rtol=1e-3)


def test_numbers_of_a_grid_compile_nothing():
    grid(FLOW, 6, "karras", sigma_min=0.01)
    before = grids._points._cache_size()
    grid(FLOW, 6, "karras", sigma_min=0.02, rho=5.0, shift=2.0)
    grid(FLOW, 6, "exponential", sigma_max=30.0)
    assert grids._points._cache_size() == before
    traced = jax.jit(lambda x: x + grid(FLOW, 6, "cosine").t[1])(jnp.zeros(()))
    assert float(traced) == pytest.approx(float(grid(FLOW, 6, "cosine").t[1]))


def test_a_config_names_a_spacing_with_its_options():
    section = dict(name="karras", rho=5.0, sigma_min=0.1, shift=2.0)
    want = grid(FLOW, 6, "karras", rho=5.0, sigma_min=0.1, shift=2.0)
    np.testing.assert_array_equal(sampler.grid(section, FLOW, 6).t, want.t)
    np.testing.assert_array_equal(sampler.grid("beta", FLOW, 6).t, grid(FLOW, 6, "beta").t)


BAD = {
    "is no spacing": (lambda: sampler.grid("karas", EDM, 4), "'karas'; did you mean 'karras'"),
    "typo": (
        lambda: sampler.grid(dict(name="karras", sigma_mn=1.0), EDM, 4),
        "takes no 'sigma_mn'; did you mean 'sigma_min'",
    ),
    "no name": (lambda: sampler.grid(dict(rho=5.0), EDM, 4), "lacks a name"),
    "typo in shift": (
        lambda: sampler.grid(dict(name="uniform", shift=dict(token=9)), FLOW, 4),
        "takes no 'token'; did you mean 'tokens'",
    ),
    "none": (lambda: sampler.grid("uniform", EDM, 0), "at least one step, not 0"),
    "many": (lambda: sampler.grid("lcm", TABLE, 51), "steps = 51 <= original=50"),
    "table": (lambda: grid(TABLE, 1001, "leading"), "1001 steps were asked of a table of 1000"),
    "no table": (lambda: grid(EDM, 4, "lcm"), "this path has none; use 'uniform'"),
    "option": (lambda: grid(EDM, 4, "trailing", rho=7.0), "has no option 'rho'; its options are"),
    "order": (lambda: grid(EDM, 4, "karras", sigma_min=9.0, sigma_max=1.0), "must hold"),
    "outside": (
        lambda: grid(EDM, 4, "karras", sigma_min=90.0, sigma_max=99.0),
        "no levels between",
    ),
    "of": (lambda: grid(EDM, 4, "karras", of="alpha"), "there is no of='alpha'"),
    "ays": (lambda: grid(EDM, 4, "ays", model="sd3"), "no list for model='sd3'"),
    "svd": (lambda: grid(EDM, 4, "ays", model="svd"), "begins at sigma / alpha = 700"),
    "shift": (lambda: grid(TABLE, 4, shift=3.0), "for paths from pure noise to clean data"),
    "negative": (lambda: grid(FLOW, 4, shift=-3.0), "shift = -3.0 must be positive"),
    "length": (lambda: grid(EDM, 4, "list", ratios=(3.0, 1.0)), "a list of 4 levels is needed"),
    "rising": (lambda: grid(EDM, 2, "list", ratios=(1.0, 3.0)), "levels of a list must fall"),
    "beyond": (lambda: grid(EDM, 2, "list", ratios=(99.0, 3.0)), "from at most 80"),
    "restart": (lambda: grid(EDM, 4, restarts=((0.1, 0.01, 2, 1),)), "must rise from a level"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_grids_raise_one_clear_sentence(case):
    act, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        act()
