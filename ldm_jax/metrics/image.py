"""How close a reconstruction is to its original: PSNR and SSIM, per sample, in any number of
dimensions.

    PSNR = 10 log10(L^2 / MSE)
    SSIM = mean of (2 m_x m_y + C1) (2 s_xy + C2) / ((m_x^2 + m_y^2 + C1) (s_x^2 + s_y^2 + C2))

where m, s^2, s_xy are means, variances and covariance under a Gaussian window, and L = 2 is the
range of data in [-1, 1].
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

RANGE = 2.0
WINDOW, SIGMA, K1, K2 = 11, 1.5, 0.01, 0.03  # Wang et al. 2004, section III.C


def psnr(x: Float[Array, "b *space c"], y: Float[Array, "b *space c"]) -> Float[Array, " b"]:
    """Peak signal-to-noise ratio in dB of data in [-1, 1]; infinite where both are equal."""
    error = jnp.square(x.astype(jnp.float32) - y.astype(jnp.float32))
    return 10 * jnp.log10(RANGE**2 / error.reshape(error.shape[0], -1).mean(-1))


def ssim(x: Float[Array, "b *space c"], y: Float[Array, "b *space c"]) -> Float[Array, " b"]:
    """Structural similarity of data in [-1, 1] (Wang et al. 2004, eq. 13); 1 where both are equal.

    The window is separable and applied along every spatial axis, only where it lies fully inside;
    channels are averaged.

    Raises:
      ValueError: a spatial axis that is shorter than the window.
    """
    if x.ndim < 3 or min(x.shape[1:-1]) < WINDOW:
        raise ValueError(
            f"SSIM looks through a window of {WINDOW} positions along each axis "
            f"and got the grid {x.shape[1:-1]}"
        )
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    mx, my, xx, yy, xy = _windowed(jnp.stack([x, y, x * x, y * y, x * y]))
    var_x, var_y, cov = xx - mx * mx, yy - my * my, xy - mx * my
    c1, c2 = (K1 * RANGE) ** 2, (K2 * RANGE) ** 2
    luminance = (2 * mx * my + c1) / (mx * mx + my * my + c1)
    structure = (2 * cov + c2) / (var_x + var_y + c2)
    score = luminance * structure
    return score.reshape(score.shape[0], -1).mean(-1)


def _windowed(moments: Float[Array, "m b *space c"]) -> Float[Array, "m b *_space c"]:
    offsets = jnp.arange(WINDOW) - WINDOW // 2
    taps = jnp.exp(-0.5 * jnp.square(offsets / SIGMA))
    taps = taps / taps.sum()
    for axis in range(2, moments.ndim - 1):
        size = moments.shape[axis] - WINDOW + 1
        moments = sum(
            taps[i] * jax.lax.slice_in_dim(moments, i, i + size, axis=axis) for i in range(WINDOW)
        )
    return moments
