"""What is done with a guided prediction: functions of all that guidance knew, for `guidance.cfg` and its like.

Large scales overshoot: pictures get too bright, too colourful, and break. Each of these takes some of that back, and
returns a prediction that still satisfies x_t = alpha x0 + sigma eps. Several are applied one after the other. Their
settings are scalars or one a sample, [b], and may be traced.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from ldm_jax.diffusion import targets
from ldm_jax.diffusion.process import Data, Path, Times, over
from ldm_jax.types import Cond, Denoiser, Prediction


class Parts(NamedTuple):
    """What guidance knew at x_t, and what it made of it."""

    x_t: Data
    t: Times
    cond: Cond
    scale: jax.Array  # [] or [b]
    positive: Prediction  # with the condition
    negative: Prediction  # without
    out: Prediction


Finish = Callable[[Parts], Prediction]


def with_x0(path: Path, x_t: Data, t: Times, old: Prediction, x0: Data) -> Prediction:
    """Another x0, and the eps that explains x_t with it; the old one to the bit if x0 is the old one."""
    eps = old.eps + over(path.alpha(t) / path.sigma(t), x_t) * (old.x0 - x0)
    return old.replace(x0=x0, eps=eps)


def with_eps(path: Path, x_t: Data, t: Times, old: Prediction, eps: Data) -> Prediction:
    """Another eps, and the x0 that explains x_t with it; at pure noise (alpha = 0), where none does, the old ones."""
    alpha = path.alpha(t)
    some = over(alpha > 0, x_t)
    ratio = over(path.sigma(t) / jnp.where(alpha > 0, alpha, 1), x_t)
    x0 = old.x0 + jnp.where(some, ratio * (old.eps - eps), 0)
    return old.replace(x0=x0, eps=jnp.where(some, eps, old.eps))


def _axes(x):
    return tuple(range(1, x.ndim))


def _per_sample(value, x):
    return over(jnp.asarray(value, x.dtype), x)


def rescale(path: Path, phi: ArrayLike) -> Finish:
    """Large scales do not overexpose (Lin et al. 2023, eq. 15-16, on x0).

    Gives the guided x0 the standard deviation of the conditional one, by the share phi in [0, 1].
    """

    def finish(parts):
        positive, x0 = parts.positive.x0, parts.out.x0
        factor = positive.std(_axes(x0), keepdims=True) / x0.std(_axes(x0), keepdims=True)
        share = _per_sample(phi, x0)
        return with_x0(path, parts.x_t, parts.t, parts.out, x0 * (share * factor + 1 - share))

    return finish


def threshold(
    path: Path, share: ArrayLike, limit: ArrayLike = 1.0, most: ArrayLike = jnp.inf
) -> Finish:
    """Dynamic thresholding (Saharia et al. 2022, Imagen, section 2.3): no values beyond those of data.

        x0 = clip(x0, -s, s) limit / s,    s = the quantile `share` of |x0| in the sample, but at least `limit`

    For pixels in [-1, 1]; the latents of an autoencoder have no such bound, so give them a `limit` of their own, about
    what their largest values are. diffusers' schedulers bound s from above too (`sample_max_value`, which has to be
    raised from its 1.0, where it is plain clipping): `most`.
    """

    def finish(parts):
        x0 = parts.out.x0
        q = jnp.broadcast_to(jnp.asarray(share, x0.dtype), x0.shape[:1])
        s = jax.vmap(jnp.quantile)(jnp.abs(x0).reshape(len(x0), -1), q)
        s, bound = over(s, x0), _per_sample(limit, x0)
        s = jnp.maximum(jnp.minimum(s, _per_sample(most, x0)), bound)
        return with_x0(path, parts.x_t, parts.t, parts.out, x0.clip(-s, s) * (bound / s))

    return finish


def apg(path: Path, eta: ArrayLike = 0.0, radius: ArrayLike = jnp.inf) -> Finish:
    """Adaptive projected guidance (Sadat et al. 2024), on x0 as theirs.

        x0 = x0(cond) + (scale - 1) (orthogonal + eta parallel)

    where the difference of the two predictions is first cut to the length `radius`, and then split along x0(cond). What
    is parallel to it makes colours too strong; eta = 1 keeps it, which with radius = inf is classifier-free guidance.
    Only after `cfg`, before any other finish.

    Without the paper's momentum, an average over steps: a denoiser is a function of x_t and t and remembers nothing.
    diffusers projects whatever the network predicts, noise or velocity, instead of x0.
    """

    def finish(parts):
        positive = parts.positive.x0
        difference = positive - parts.negative.x0

        def dot(a, b):
            return (a * b).sum(_axes(a), keepdims=True)

        def over_norm(a):
            return lax.rsqrt(jnp.maximum(dot(a, a), jnp.finfo(a.dtype).tiny))

        cut = difference * jnp.minimum(1, _per_sample(radius, positive) * over_norm(difference))
        along = positive * over_norm(positive)
        cut = cut - (1 - _per_sample(eta, positive)) * dot(cut, along) * along
        w = over(parts.scale, positive)
        x0 = parts.out.x0 + (w - 1) * (cut - difference)
        return with_x0(path, parts.x_t, parts.t, parts.out, x0)

    return finish


def zero_star(path: Path) -> Finish:
    """The optimized scale of CFG-Zero* (Fan et al. 2025, section 4), on velocities.

        v = scale v(cond) + (1 - scale) s v(null),    s = <v(cond), v(null)> / |v(null)|^2

    Made for flow matching; on other paths too v is dx_t / dt. Only after `cfg`, before any other finish. The other half
    of the method is `guidance.still`. diffusers scales whatever the network predicts.
    """
    row = targets.flow().row

    def finish(parts):
        x_t, t = parts.x_t, parts.t
        a, b = (over(c, x_t) for c in row(path, t))
        alpha, sigma = over(path.alpha(t), x_t), over(path.sigma(t), x_t)
        v, null = (a * p.x0 + b * p.eps for p in (parts.positive, parts.negative))
        norm = jnp.maximum((null * null).sum(_axes(v), keepdims=True), jnp.finfo(v.dtype).tiny)
        s = (v * null).sum(_axes(v), keepdims=True) / norm
        change = (1 - over(parts.scale, x_t)) * (s - 1) * null
        d = alpha * b - sigma * a
        x0, eps = parts.out
        return parts.out.replace(x0=x0 - sigma / d * change, eps=eps + alpha / d * change)

    return finish


def further(weak: Denoiser, scale: ArrayLike) -> Finish:
    """Beside `cfg`, away from a weaker denoiser: out + scale (positive - weak), as Ahn et al. 2024 (PAG) have both."""

    def finish(parts):
        worse = weak(parts.x_t, parts.t, parts.cond)
        s = _per_sample(scale, parts.x_t)
        triples = zip(parts.out, parts.positive, worse, strict=True)
        x0, eps = (out + s * (p - w) for out, p, w in triples)
        return parts.out.replace(x0=x0, eps=eps)

    return finish
