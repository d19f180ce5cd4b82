"""Guidance makes one denoiser out of another, that follows the condition more closely.

    x0 = scale x0(cond) + (1 - scale) x0(null),    eps likewise

A combination of two predictions whose weights sum to one still satisfies x_t = alpha x0 + sigma
eps, so solvers do not notice, and it does not matter whether x0, eps or a velocity is combined.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from ldm_jax.diffusion.process import Path, over
from ldm_jax.types import Cond, Denoiser, Prediction

# (x_t, t, prediction with the condition, guided prediction) -> prediction
Finish = Callable[..., Prediction]


def cfg(denoise: Denoiser, null: Cond, scale: ArrayLike, finish: Finish | None = None) -> Denoiser:
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6, with scale = 1 + w).

    One call on a doubled batch. `scale` is a scalar or one value a sample, [b], and may be traced:
    1 is the model itself, 0 the unconditional one. The fields of `null` have the batch size of the
    data or 1. `finish` has the last word, see `rescale`.

    Raises:
      ValueError: a field of the condition that the null condition lacks.
    """

    def guided(x_t, t, cond):
        both = denoise(
            jnp.concatenate([x_t, x_t]), jnp.concatenate([t, t]), join(cond, null, len(x_t))
        )
        positive, negative = (
            Prediction(*half) for half in zip(*(jnp.split(f, 2) for f in both), strict=True)
        )
        w = over(jnp.asarray(scale, positive.x0.dtype), x_t)
        # Not negative + w (positive - negative): this form is the model itself, to the bit, at w =
        # 1.
        out = Prediction(*(w * c + (1 - w) * u for c, u in zip(positive, negative, strict=True)))
        return finish(x_t, t, positive, out) if finish else out

    return guided


def edit(
    denoise: Denoiser, shown: Cond, null: Cond, scale: ArrayLike, image_scale: ArrayLike
) -> Denoiser:
    """Guidance by a text and by an image (Brooks et al. 2023, InstructPix2Pix, eq. 3).

        null + image_scale (shown - null) + scale (cond - shown)

    where `shown` has the image alone and `null` nothing. One call on a tripled batch; scales as in `cfg`.
    """

    def guided(x_t, t, cond):
        conds = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), cond, shown, null)
        every = denoise(jnp.concatenate([x_t] * 3), jnp.concatenate([t] * 3), conds)

        def combine(part):
            text, image, nothing = jnp.split(part, 3)
            w, w_image = (over(jnp.asarray(s, part.dtype), x_t) for s in (scale, image_scale))
            return w * text + (w_image - w) * image + (1 - w_image) * nothing

        return Prediction(*map(combine, every))

    return guided


def rescale(path: Path, phi: ArrayLike) -> Finish:
    """For `cfg`: large scales do not overexpose (Lin et al. 2023, eq. 15-16, on x0).

    Gives the guided x0 the standard deviation of the conditional one, by the share phi in [0, 1].
    """

    def finish(x_t, t, positive, out):
        axes = tuple(range(1, x_t.ndim))
        factor = positive.x0.std(axes, keepdims=True) / out.x0.std(axes, keepdims=True)
        share = over(jnp.asarray(phi, factor.dtype), x_t)
        x0 = out.x0 * (share * factor + 1 - share)
        # Keep x_t = alpha x0 + sigma eps.
        return Prediction(x0, out.eps + over(path.alpha(t) / path.sigma(t), x_t) * (out.x0 - x0))

    return finish


def interval(guided: Denoiser, plain: Denoiser, lo: ArrayLike, hi: ArrayLike) -> Denoiser:
    """Guidance for lo < t <= hi only, elsewhere the plain denoiser (Kynkäänniemi et al. 2024).

    The paper's bounds are noise levels; `path.time_of(-log(sigma / alpha))` turns them into times.
    Where no sample is inside, the guided denoiser is not called.
    """

    def denoise(x_t, t, cond):
        inside = (t > lo) & (t <= hi)

        def mixed():
            pairs = zip(guided(x_t, t, cond), plain(x_t, t, cond), strict=True)
            return Prediction(*(jnp.where(over(inside, x_t), g, p) for g, p in pairs))

        def some():
            return lax.cond(jnp.all(inside), lambda: guided(x_t, t, cond), mixed)

        return lax.cond(jnp.any(inside), some, lambda: plain(x_t, t, cond))

    return denoise


def join(cond: Cond, null: Cond, batch: int) -> Cond:
    """Both conditions one after the other, [2 b]; token lists of unequal length are padded.

    Residuals and controls that the null condition lacks are the condition's in both halves: guidance is then away from
    the picture that the other fields' absence gives, with the same hints.
    """
    fields = {}
    for name in ("vector", "tokens", "spatial"):
        first, second = getattr(cond, name), getattr(null, name)
        if (first is None) != (second is None):
            has, lacks = (
                ("condition", "null condition")
                if second is None
                else ("null condition", "condition")
            )
            raise ValueError(
                f"the {has} has the field {name!r} and the {lacks} has not; "
                "make both with one conditioner"
            )
        if first is not None:
            second = jnp.broadcast_to(second, (batch, *second.shape[1:]))
            fields[name] = (first, second)
    mask = None
    if "tokens" in fields:
        fields["tokens"], mask = _tokens(fields["tokens"], (cond.mask, null.mask), batch)
    return Cond(
        **{name: jnp.concatenate(pair) for name, pair in fields.items()},
        mask=mask,
        **{name: _steering(name, cond, null, batch) for name in ("residuals", "controls")},
    )


def _steering(name: str, cond: Cond, null: Cond, batch: int) -> Any:
    """Residuals or controls of both; their scalars and single rows become one a sample."""
    first = getattr(cond, name)
    second = getattr(null, name) or first
    if jax.tree.structure(first) != jax.tree.structure(second):
        raise ValueError(
            f"the {name} of the condition and those of the null condition are not as many; "
            "give the null condition as many, or none to use the condition's"
        )

    def rows(a):
        a = jnp.asarray(a)
        return jnp.broadcast_to(a, (batch, *a.shape[1:]))

    return jax.tree.map(lambda a, b: jnp.concatenate([rows(a), rows(b)]), first, second)


def _tokens(tokens, masks, batch):
    """Both token lists at the longer's length, and one mask; None where every token counts."""
    n = max(a.shape[1] for a in tokens)
    if all(m is None for m in masks) and tokens[0].shape[1] == tokens[1].shape[1]:
        return tokens, None
    masks = [
        jnp.ones((1, a.shape[1]), bool) if m is None else m
        for a, m in zip(tokens, masks, strict=True)
    ]
    masks = [jnp.pad(m, ((0, 0), (0, n - m.shape[1]))) for m in masks]
    mask = jnp.concatenate([jnp.broadcast_to(m, (batch, n)) for m in masks])
    return tuple(jnp.pad(a, ((0, 0), (0, n - a.shape[1]), (0, 0))) for a in tokens), mask
