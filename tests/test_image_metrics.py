import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from ldm_jax.metrics import image


def pair(shape, noise=0.3, seed=0):
    rng = np.random.default_rng(seed)
    smooth = [gaussian_filter(rng.uniform(-1, 1, shape[1:]), 1.0) * 3 for _ in range(shape[0])]
    x = np.clip(np.stack(smooth), -1, 1).astype(np.float32)
    y = np.clip(x + noise * rng.standard_normal(shape), -1, 1).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(y)


def scipy_ssim(x, y):
    """Wang et al. 2004 in float64 of one channel with scipy's filter, in the valid region."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)

    def blur(a):
        return gaussian_filter(a, 1.5, truncate=3.5)  # radius 5: 11 taps

    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    s = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    return s[(slice(5, -5),) * x.ndim].mean()


@pytest.mark.parametrize("space", [(40,), (24, 17), (12, 13, 14)])
def test_ssim_equals_scipy(space):
    x, y = pair((2, *space, 3))
    expected = [
        np.mean([scipy_ssim(x[i, ..., c], y[i, ..., c]) for c in range(3)]) for i in range(2)
    ]
    assert 0.1 < min(expected) < 0.95
    np.testing.assert_allclose(jax.jit(image.ssim)(x, y), expected, atol=2e-5)


def test_ssim_of_equal_images_is_one_and_does_not_depend_on_the_order():
    x, y = pair((2, 16, 16, 3))
    np.testing.assert_allclose(image.ssim(x, x), 1.0, atol=1e-6)
    np.testing.assert_allclose(image.ssim(x, y), image.ssim(y, x), atol=1e-6)


def test_ssim_of_constants_is_the_luminance_term():
    a, b = 0.5, -0.25
    x, y = jnp.full((1, 11, 11, 1), a), jnp.full((1, 11, 11, 1), b)
    c1 = 4e-4
    expected = (2 * a * b + c1) / (a * a + b * b + c1)
    # In float32 the variance of a constant is 1e-8, not 0: nothing against C2 = 3.6e-3.
    np.testing.assert_allclose(image.ssim(x, y), [expected], rtol=1e-4)


def test_psnr_in_closed_form_and_per_sample():
    x = jnp.zeros((2, 8, 8, 3))
    y = jnp.stack([jnp.full((8, 8, 3), 0.2), jnp.full((8, 8, 3), 0.02)])
    np.testing.assert_allclose(image.psnr(x, y), [20.0, 40.0], rtol=1e-5)  # 20 log10(2 / d)
    assert np.all(np.isinf(image.psnr(x, x)))


def test_psnr_is_float32_for_half_precision():
    x, y = pair((2, 16, 3))
    low = image.psnr(x.astype(jnp.bfloat16), y.astype(jnp.bfloat16))
    assert low.dtype == jnp.float32
    np.testing.assert_allclose(low, image.psnr(x, y), atol=0.1)


def test_ssim_names_the_axis_that_is_too_short():
    x = jnp.zeros((1, 16, 10, 3))
    with pytest.raises(ValueError, match=r"window of 11 .*\(16, 10\)"):
        image.ssim(x, x)
