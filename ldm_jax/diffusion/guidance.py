"""Guidance makes one denoiser out of another, that follows the condition more closely.

    x0 = scale x0(cond) + (1 - scale) x0(null),    eps likewise

A combination of two predictions whose weights sum to one still satisfies x_t = alpha x0 + sigma
eps, so solvers do not notice, and it does not matter whether x0, eps or a velocity is combined.
What else is done with both predictions (`finishes`) keeps that equation too.

Every scale is a scalar or one value a sample, [b], and may be traced.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from ldm_jax.diffusion import conditions, targets
from ldm_jax.diffusion.finishes import Finish, Parts
from ldm_jax.diffusion.process import Data, Path, Times, over
from ldm_jax.types import Cond, Denoiser, Prediction


def each(
    denoise: Denoiser, x_t: Data, t: Times, conds: Sequence[Cond], batched: bool = True
) -> list[Prediction]:
    """The predictions for k conditions: one call on a k-fold batch, or else k calls one after the other.

    The latter needs the memory of a single batch, and is one program that runs k times.
    """
    k, b = len(conds), len(x_t)
    every = conditions.join(conds, b)
    if batched:
        out = denoise(jnp.concatenate([x_t] * k), jnp.concatenate([t] * k), every)
        return [jax.tree.map(lambda part: jnp.split(part, k)[i], out) for i in range(k)]
    turns = jax.tree.map(lambda a: a.reshape(k, b, *a.shape[1:]), every)
    out = lax.map(lambda cond: denoise(x_t, t, cond), turns)
    return [jax.tree.map(lambda part: part[i], out) for i in range(k)]


def combine(weights: Sequence[ArrayLike], predictions: Sequence[Prediction]) -> Prediction:
    """The weighted sum, in order; with weights that sum to one it explains x_t as its parts do.

    A learned variance is that of the first of them, as Peebles & Xie 2023 have it.
    """

    def summed(*parts):
        first, *rest = (
            over(jnp.asarray(w, p.dtype), p) * p for w, p in zip(weights, parts, strict=True)
        )
        for more in rest:
            first = first + more
        return first

    return Prediction(*map(summed, *predictions), spread=predictions[0].spread)


def cfg(
    denoise: Denoiser, null: Cond, scale: ArrayLike, *finish: Finish, batched: bool = True
) -> Denoiser:
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6, with scale = 1 + w).

    One call on a doubled batch, or without `batched` two in turn: slower, in half the memory. A
    scale of 1 is the model itself, 0 the unconditional one. The fields of `null` have the batch
    size of the data or 1; a null condition made of other prompts is a negative prompt. What is in
    `finish` is applied in its order.

    Raises:
      ValueError: a field of the condition that the null condition lacks.
    """

    def guided(x_t, t, cond):
        positive, negative = each(denoise, x_t, t, (cond, null), batched)
        return _apart(x_t, t, cond, positive, negative, scale, finish)

    return guided


def _apart(x_t, t, cond, positive, negative, scale, finish):
    w = jnp.asarray(scale, positive.x0.dtype)
    # Not negative + w (positive - negative): this form is the model itself, to the bit, at w = 1.
    out = combine((w, 1 - w), (positive, negative))
    return finish_all(Parts(x_t, t, cond, w, positive, negative, out), finish)


def finish_all(parts: Parts, finish: Sequence[Finish]) -> Prediction:
    """What is left after each of them had its turn."""
    for f in finish:
        parts = parts._replace(out=f(parts))
    return parts.out


def finished(denoise: Denoiser, *finish: Finish) -> Denoiser:
    """A denoiser with `finishes` of its own: positive, negative and guided prediction are the same."""

    def denoiser(x_t, t, cond):
        p = denoise(x_t, t, cond)
        return finish_all(Parts(x_t, t, cond, jnp.ones((), p.x0.dtype), p, p, p), finish)

    return denoiser


def autoguidance(denoise: Denoiser, weak: Denoiser, scale: ArrayLike, *finish: Finish) -> Denoiser:
    """Away from a weaker model, one that is smaller or trained less (Karras et al. 2024).

    `scale` x0 of the model + (1 - scale) x0 of the weaker one, at the same condition. With a
    network whose attention is perturbed as the weaker one it is Ahn et al.'s guidance (`taps`),
    with scale = 1 + s.
    """

    def guided(x_t, t, cond):
        return _apart(x_t, t, cond, denoise(x_t, t, cond), weak(x_t, t, cond), scale, finish)

    return guided


def edit(
    denoise: Denoiser,
    shown: Cond,
    null: Cond,
    scale: ArrayLike,
    image_scale: ArrayLike,
    batched: bool = True,
) -> Denoiser:
    """Guidance by a text and by an image (Brooks et al. 2023, InstructPix2Pix, eq. 3).

        null + image_scale (shown - null) + scale (cond - shown)

    where `shown` has the image alone and `null` nothing. One call on a tripled batch; scales as in `cfg`.
    """

    def guided(x_t, t, cond):
        every = each(denoise, x_t, t, (cond, shown, null), batched)
        w, w_image = (jnp.asarray(s, every[0].x0.dtype) for s in (scale, image_scale))
        return combine((w, w_image - w, 1 - w_image), every)

    return guided


def compose(
    denoise: Denoiser,
    others: Sequence[Cond],
    null: Cond,
    scales: Sequence[ArrayLike],
    batched: bool = True,
) -> Denoiser:
    """The condition AND the others (Liu et al. 2022): all of the guided differences at once.

        null + sum_i scale_i (cond_i - null)

    with the condition that the denoiser is called with as the first. One call on a batch of k + 1. A negative scale is
    their NOT.

    Raises:
      ValueError: another number of scales than of conditions.
    """
    _as_many(others, scales)

    def guided(x_t, t, cond):
        every = each(denoise, x_t, t, (cond, *others, null), batched)
        w = [jnp.asarray(s, every[0].x0.dtype) for s in scales]
        return combine((*w, 1 - sum(w)), every)

    return guided


def mix(
    denoise: Denoiser, others: Sequence[Cond], weights: Sequence[ArrayLike], batched: bool = True
) -> Denoiser:
    """The weighted mean of the predictions for the condition and for others; the weights need no sum of 1.

    `conditions.blend` averages what the network reads instead, for one call on the plain batch.

    Raises:
      ValueError: another number of weights than of conditions.
    """
    _as_many(others, weights)

    def mixed(x_t, t, cond):
        every = each(denoise, x_t, t, (cond, *others), batched)
        w = [jnp.asarray(s, every[0].x0.dtype) for s in weights]
        return combine([share / sum(w) for share in w], every)

    return mixed


def _as_many(others, weights):
    if len(weights) != len(others) + 1:
        raise ValueError(
            f"{len(weights)} scales for the condition and {len(others)} others; give one for each"
        )


def interval(guided: Denoiser, plain: Denoiser, lo: ArrayLike, hi: ArrayLike) -> Denoiser:
    """Guidance for lo < t <= hi only, elsewhere the plain denoiser (Kynkäänniemi et al. 2024).

    The paper's bounds are noise levels; `path.time_of(-log(sigma / alpha))` turns them into times.
    Where no sample is inside, the guided denoiser is not called, and where all are, the plain one is not.
    """

    def denoise(x_t, t, cond):
        inside = (t > lo) & (t <= hi)

        def mixed():
            return jax.tree.map(
                lambda g, p: jnp.where(over(inside, x_t), g, p),
                guided(x_t, t, cond),
                plain(x_t, t, cond),
            )

        def some():
            return lax.cond(jnp.all(inside), lambda: guided(x_t, t, cond), mixed)

        return lax.cond(jnp.any(inside), some, lambda: plain(x_t, t, cond))

    return denoise


def still(path: Path) -> Denoiser:
    """Says that the velocity dx_t / dt is zero, whatever x_t is.

    `interval(still(path), guided, lo, inf)` is the zero-init of Fan et al. 2025 (CFG-Zero*, section 4): on a straight
    path the first steps, those with t > lo, leave x_t as it is, for what a flow says there has the largest error.
    """
    row = targets.flow().row

    def denoise(x_t, t, cond):
        a, b = (over(c, x_t) for c in row(path, t))
        d = over(path.alpha(t), x_t) * b - over(path.sigma(t), x_t) * a
        return Prediction(b * x_t / d, -a * x_t / d)

    return denoise
