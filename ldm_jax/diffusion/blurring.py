"""Self-attention guidance (Hong et al. 2023): away from what the network makes of a picture blurred where it looks.

The estimate of x0 is blurred where the network's own attention is high, noised again, and denoised. The guided noise is

    eps(x_t) + scale (eps(x_t) - eps(blurred x_t))                     without a null condition
    guided eps + scale (eps(x_t, null) - eps(blurred x_t, null))       beside classifier-free guidance (their eq. 25)

where in the second the estimate, the attention and the blurred prediction are all those of the null condition.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from ldm_jax.diffusion import conditions
from ldm_jax.diffusion.finishes import Finish, Parts, with_eps
from ldm_jax.diffusion.guidance import combine, finish_all
from ldm_jax.diffusion.process import Path, add_noise, over
from ldm_jax.types import Cond, Denoiser, Prediction

# (x_t, t, cond) -> the prediction, and how much each position is attended to: 1 on average
Look = Callable[..., tuple[Prediction, Float[Array, "b *coarse"]]]


def sag(
    look: Look,
    path: Path,
    scale: ArrayLike,
    null: Cond | None = None,
    guidance: ArrayLike = 1.0,
    *finish: Finish,
    level: float = 1.0,
    std: float = 1.0,
) -> Denoiser:
    """Self-attention guidance, with classifier-free guidance beside it where `null` is given.

    Positions that get more than `level` times their share of attention are blurred by a Gaussian of `std` latents.
    Scales are scalars or one a sample, [b], and may be traced; `scale` = 0 is `cfg`. One call more than `cfg`.

    With the targets v and x0 diffusers adds the difference of the network's outputs, as if they were noise; here the
    noises are compared whatever the network predicts.
    """

    def guided(x_t, t, cond):
        if null is None:
            base, attention = look(x_t, t, cond)
            positive, out, of, w = base, base, cond, jnp.ones((), x_t.dtype)
        else:
            twice = jnp.concatenate([x_t, x_t]), jnp.concatenate([t, t])
            both, attention = look(*twice, conditions.join((cond, null), len(x_t)))
            positive, base = (
                jax.tree.map(lambda part: jnp.split(part, 2)[i], both) for i in range(2)
            )
            w = jnp.asarray(guidance, x_t.dtype)
            out, attention = combine((w, 1 - w), (positive, base)), jnp.split(attention, 2)[1]
            of = conditions.join((null,), len(x_t))
            if not null.controls and null.residuals is None:  # then the condition's, as in `join`
                of = of.replace(controls=cond.controls, residuals=cond.residuals)
        worse, _ = look(
            add_noise(path, degraded(base.x0, attention, level, std), base.eps, t), t, of
        )
        s = over(jnp.asarray(scale, x_t.dtype), x_t)
        out = with_eps(path, x_t, t, out, out.eps + s * (base.eps - worse.eps))
        return finish_all(Parts(x_t, t, cond, w, positive, base, out), finish)

    return guided


def degraded(
    x0: Float[Array, "b *space c"],
    attention: Float[Array, "b *coarse"],
    level: float = 1.0,
    std: float = 1.0,
) -> Float[Array, "b *space c"]:
    """x0, blurred where the attention is above `level`; the mask grows to the size of x0 by its nearest values."""
    mask = (attention > level).astype(x0.dtype)[..., None]
    mask = jax.image.resize(mask, (*x0.shape[:-1], 1), "nearest")
    return mask * blur(x0, std) + (1 - mask) * x0


def blur(
    x: Float[Array, "b *space c"], std: float = 1.0, radius: int = 4
) -> Float[Array, "b *space c"]:
    """A Gaussian along every spatial axis, cut after `radius` positions, with mirrored borders."""
    offsets = jnp.arange(-radius, radius + 1)
    weights = jnp.exp(-((offsets / std) ** 2) / 2)
    weights = weights / weights.sum()
    for axis in range(1, x.ndim - 1):
        width = [(radius, radius) if i == axis else (0, 0) for i in range(x.ndim)]
        padded, n = jnp.pad(x, width, mode="reflect"), x.shape[axis]
        shifted = (jax.lax.slice_in_dim(padded, i, i + n, axis=axis) for i in range(len(offsets)))
        x = sum(w * s for w, s in zip(weights, shifted, strict=True))
    return x
