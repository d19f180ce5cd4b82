"""Degradation for super-resolution: its interpolations, kernels and noise against references, and the whole."""

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from ldm_jax.data import degradation
from ldm_jax.data.degradation import DEGREES


def picture(h=64, w=64, seed=0):
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, 1, (8, 8, 3)).astype(np.float32)
    return degradation.resized(coarse, (h, w), "cubic").clip(0, 1)


@pytest.mark.parametrize("kind", [*degradation.RESIZES, "smooth"])
@pytest.mark.parametrize("sizes", [(16, 7), (7, 16), (12, 4)])
def test_weights_of_an_interpolation_are_of_sum_1_and_keep_a_slope(kind, sizes):
    before, after = sizes
    weights = degradation.interpolation(before, after, kind)
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-5)
    slope = weights @ (np.arange(before) + 0.5)
    wanted = (np.arange(after) + 0.5) * before / after
    # Within reach of the ends the last position goes on; what looks at few pixels may alias, but not move.
    inner = slice(after // 3, after - after // 3)
    np.testing.assert_allclose(slope[inner], wanted[inner], atol=0.05)


def test_areas_are_means_and_the_smooth_one_is_pillow_s():
    x = picture(24, 36)
    blocks = x.reshape(6, 4, 9, 4, 3).mean((1, 3))
    np.testing.assert_allclose(degradation.resized(x, (6, 9), "area"), blocks, atol=1e-6)
    ours = degradation.resized(x, (12, 18), "smooth")
    for c in range(3):
        theirs = Image.fromarray(x[..., c]).resize((18, 12), Image.Resampling.BICUBIC)
        np.testing.assert_allclose(ours[2:-2, 2:-2, c], np.asarray(theirs)[2:-2, 2:-2], atol=1e-4)


@pytest.mark.parametrize("size", [5, 6, 25])
def test_a_blur_is_scipy_s_convolution(size):
    x, kernel = picture(32, 40), np.random.default_rng(1).random((size, size))
    wanted = ndimage.convolve(x, kernel[..., None], mode="mirror")
    np.testing.assert_allclose(degradation.blurred(x, kernel), wanted, rtol=1e-4, atol=1e-4)


def test_a_gaussian_has_its_covariance_and_its_middle():
    turn = np.array([[0.8, 0.6], [0.6, -0.8]])
    covariance = turn @ np.diag([4.0, 1.0]) @ turn
    kernel = degradation.gaussian(25, covariance, shift=1.5)
    x = np.arange(25) - 12
    grid = np.stack(np.meshgrid(x, x), -1)
    mean = np.einsum("ij,ijk->k", kernel, grid)
    np.testing.assert_allclose(mean, 1.5, atol=0.01)
    found = np.einsum("ij,ijk,ijl->kl", kernel, grid - mean, grid - mean)
    np.testing.assert_allclose(found, covariance, atol=0.02)
    # Of a point only the middle is left.
    assert degradation.gaussian(7, np.zeros((2, 2)))[3, 3] == pytest.approx(1)


def test_a_shift_looks_at_the_middle_of_a_block():
    x = np.arange(64, dtype=np.float32)[None, :, None].repeat(64, 0).repeat(3, 2)
    kernel = degradation.gaussian(degradation.SHIFTED, np.eye(2), shift=-1.5)
    shrunk = degradation.blurred(x, kernel)[::4, ::4]
    np.testing.assert_allclose(shrunk[8, 4:12, 0], np.arange(4, 12) * 4 + 1.5, atol=1e-3)


@pytest.mark.parametrize("kind", DEGREES)
def test_noise_is_as_strong_as_its_degree_says(kind):
    of = DEGREES[kind]
    deviations, grey = [], 0
    for seed in range(60):
        found = degradation.noise(of, (24, 24, 3), np.random.default_rng(seed))
        deviations.append(found.std() * 255)
        grey += found.shape[-1] == 1
    assert 0.8 * of.noise[0] * 0.3 < min(deviations)
    assert max(deviations) < 1.2 * of.noise[1]
    assert 12 < grey < 36  # two of five


@pytest.mark.parametrize("kind", degradation.KINDS)
@pytest.mark.parametrize("factor", [2, 4])
def test_a_small_picture_is_a_function_of_the_generator(kind, factor):
    pixels = degradation.to_bytes(picture())

    def small(seed):
        return degradation.small(kind, pixels, factor, np.random.default_rng(seed))

    found = small(0)
    assert found.shape == (64 // factor, 64 // factor, 3)
    assert found.dtype == np.float32
    assert np.abs(found).max() <= 1
    np.testing.assert_array_equal(found, small(0))
    changed = np.abs(found - small(1)).max() > 0
    assert changed == (kind != "bicubic")


def test_the_light_degree_does_less_and_both_keep_the_picture():
    pixels = degradation.to_bytes(picture(128, 128))
    clean = degradation.small("bicubic", pixels, 4, np.random.default_rng(0))
    errors = {}
    for kind in DEGREES:
        found = [
            degradation.small(kind, pixels, 4, np.random.default_rng(seed)) for seed in range(16)
        ]
        errors[kind] = np.sqrt(np.mean(np.square(np.stack(found) - clean), axis=(1, 2, 3)))
        # It is the same picture still: no step moves, mirrors or turns it.
        mean = np.mean(found, axis=0)
        others = [np.roll(mean, 1, 0), np.roll(mean, -1, 1), mean[:, ::-1], mean.swapaxes(0, 1)]
        alike, *unlike = (np.corrcoef(a.ravel(), clean.ravel())[0, 1] for a in (mean, *others))
        assert alike > max(0.85, *unlike)
    assert np.median(errors["bsr_light"]) < np.median(errors["bsr"])
    assert errors["bsr_light"].min() > 0.005


def test_steps_come_in_every_order_but_the_first_shrinking_before_the_second(monkeypatch):
    orders = set()
    trail = []

    def told(name, f):
        return lambda *args: (trail.append(name), f(*args))[1]

    for name in ("blurred", "shrunken", "noise", "compressed"):
        monkeypatch.setattr(degradation, name, told(name, getattr(degradation, name)))
    for seed in range(40):
        trail.clear()
        degradation.bsr(DEGREES["bsr_light"], picture(32, 32), 2, np.random.default_rng(seed))
        assert trail[-1] == "compressed"
        orders.add(tuple(trail))
    assert len(orders) > 8


def test_an_unknown_degradation():
    with pytest.raises(ValueError, match=r"no degradation 'bsrr'; choose of \('bicubic', 'bsr'"):
        degradation.check("bsrr")
