"""Data larger than the model was trained on: at every step the denoiser sees windows of its own size.

MultiDiffusion (Bar-Tal et al. 2023, eq. 5): the predictions of all windows that see a position are averaged there. An
average of pairs (x0, eps) still satisfies x_t = alpha x0 + sigma eps, so that the result is a denoiser like any other.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ldm_jax import tiles
from ldm_jax.tiles import PerAxis
from ldm_jax.types import Cond, Denoiser


def windows(
    denoise: Denoiser,
    size: PerAxis,
    overlap: PerAxis,
    wrap: bool | Sequence[bool] = False,
) -> Denoiser:
    """The denoiser in windows of `size` that overlap by at least `overlap`, one after the other.

    Cross-faded where they overlap. Along axes with `wrap` the last window goes on at the beginning, so that the ends of
    the data fit each other. Spatial conditions and hints of ControlNets are cut like the data. Data that fit into one
    window are given to the denoiser as they are.

    Raises:
      ValueError: an overlap that is not less than the size, settings for another number of axes, or a condition with
        residuals, which have the windows' resolutions.
    """

    def windowed(x_t, t, cond):
        tiling = tiles.axes(x_t.shape[1:-1], size, overlap, wrap)
        if all(len(a.starts) == 1 for a in tiling):
            return denoise(x_t, t, cond)

        def at(starts, number):
            return denoise(tiles.take(x_t, tiling, starts), t, _cut(cond, x_t, tiling, starts))

        zero = (jnp.zeros((), jnp.int32),) * len(tiling)
        found = jax.eval_shape(lambda: at(zero, zero[0]))
        whole = jax.tree.map(lambda part: jnp.zeros(x_t.shape, part.dtype), found)
        return tiles.blend(at, tiling, whole)

    return windowed


def _cut(cond: Cond, x, tiling, starts) -> Cond:
    """What a window sees of the condition."""
    if cond.residuals is not None:
        raise ValueError(
            "residuals are made for the whole and cannot be cut; give the condition controls instead"
        )

    def piece(field):
        if field is None:
            return None
        ratio = tiles.ratios(x.shape[1:-1], field.shape[1:-1])
        return tiles.take(field, tiling, starts, ratio)

    controls = tuple(c.replace(hint=piece(c.hint)) for c in cond.controls)
    return cond.replace(spatial=piece(cond.spatial), controls=controls)
