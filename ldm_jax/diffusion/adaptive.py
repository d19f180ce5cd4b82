"""The probability-flow ODE to a tolerance, in either direction, and the likelihood that it gives.

With the angle theta = arctan(sigma / alpha), from 0 for data to pi / 2 for pure noise, and x / r for r =
sqrt(alpha^2 + sigma^2), the ODE dx = x0 d alpha + eps d sigma is the same on all paths,

    d(x / r) / d theta = cos(theta) eps - sin(theta) x0,

finite at both ends, free of the path's derivatives (a table has none), and x / r is about as wide as the data
everywhere. It is integrated by Dormand & Prince's pair of orders 5 and 4 (1980), whose steps are
chosen by the difference of the two, for each sample on its own.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from ldm_jax.diffusion.process import Data, Path, over
from ldm_jax.diffusion.samplers import Source, noise
from ldm_jax.types import Cond, Denoiser

# Dormand & Prince 1980, table 2: the stages, whose last one is the solution of order 5, and its error.
TIMES = (0.2, 0.3, 0.8, 8 / 9, 1.0, 1.0)
STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
SAFETY, SHRINK, GROW = 0.9, 0.2, 5.0


class _State(NamedTuple):
    y: Any  # a pytree of [b, ...]
    slope: Any
    at: Array  # [b], the angle
    step: Array  # [b], with the sign of the direction
    tries: Array  # int32 []


def _combine(y: Any, weights: Any, slopes: list, step: Array) -> Any:
    """y + step sum_i weights_i slopes_i"""

    def one(y, *slopes):
        return y + over(step, y) * sum(w * k for w, k in zip(weights, slopes, strict=True) if w)

    return jax.tree.map(one, y, *slopes)


def _norm(tree: Any, scale: Any) -> Array:
    """[b]: the root mean square of tree / scale, the largest of the leaves'."""

    def one(a, s):
        return jnp.sqrt(jnp.mean((a / s) ** 2, axis=tuple(range(1, a.ndim))))

    return jnp.max(jnp.stack(jax.tree.leaves(jax.tree.map(one, tree, scale))), axis=0)


def _solve(
    f: Callable,
    y: Any,
    start: Array,
    end: Array,
    rtol: ArrayLike,
    atol: ArrayLike,
    limit: ArrayLike,
) -> tuple[Any, Array]:
    """y at `end`, for dy / d theta = f(y, theta), and the number of calls of f."""
    sign = jnp.sign(end - start)

    def scale(a, b):
        return jax.tree.map(lambda a, b: atol + rtol * jnp.maximum(jnp.abs(a), jnp.abs(b)), a, b)

    def running(state):
        return jnp.any(sign * (end - state.at) > 0) & (state.tries < limit)

    def attempt(state):
        left = end - state.at
        last = jnp.abs(state.step) >= jnp.abs(left)
        step = jnp.where(last, left, state.step)
        slopes = [state.slope]
        for c, row in zip(TIMES, STAGES, strict=True):
            guess = _combine(state.y, row, slopes, step)
            slopes.append(f(guess, state.at + c * step))
        zero = jax.tree.map(jnp.zeros_like, state.y)
        error = _norm(_combine(zero, ERROR, slopes, step), scale(state.y, guess))
        good = (error <= 1) & (step != 0)
        factor = SAFETY * jnp.maximum(error, 1e-10) ** -0.2
        factor = jnp.clip(factor, SHRINK, jnp.where(good, GROW, 1.0))
        factor = jnp.where(jnp.isfinite(error), factor, SHRINK)

        def keep(new, old):
            return jax.tree.map(
                lambda a, b: jnp.where(good.reshape((-1,) + (1,) * (a.ndim - 1)), a, b), new, old
            )

        at = jnp.where(good, jnp.where(last, end, state.at + step), state.at)
        step = jnp.where(step != 0, step * factor, state.step)
        y, slope = keep(guess, state.y), keep(slopes[-1], state.slope)
        return _State(y, slope, at, step, state.tries + 1)

    slope = f(y, start)
    # Hairer et al. 1993, section II.4: a step whose Euler increment is a hundredth of y.
    size = 0.01 * jnp.maximum(_norm(y, scale(y, y)), 1e-2)
    step = size / jnp.maximum(_norm(slope, scale(y, y)), 1e-6)
    step = sign * jnp.minimum(step, jnp.abs(end - start))
    first = _State(y, slope, start, step, jnp.zeros((), jnp.int32))
    done = lax.while_loop(running, attempt, first)
    missing = sign * (end - done.at) > 0
    y = jax.tree.map(lambda a: jnp.where(over(missing, a), jnp.nan, a), done.y)
    return y, 1 + len(STAGES) * done.tries


def _angle(path: Path, t: ArrayLike, like: Data) -> tuple[Array, Array]:
    """theta and r at t, each [b]."""
    t = jnp.broadcast_to(jnp.asarray(t, like.dtype), like.shape[:1])
    alpha, sigma = path.alpha(t), path.sigma(t)
    return jnp.arctan2(sigma, alpha), jnp.hypot(sigma, alpha)


def _field(denoise: Denoiser, path: Path, cond: Cond) -> Callable:
    """(x / r, theta) -> d(x / r) / d theta"""

    def field(y, theta):
        # The time's own level, which differs from theta by rounding, and at the ends of the path.
        cos, sin = jnp.maximum(jnp.cos(theta), 0.0), jnp.sin(theta)  # pi / 2 is rounded up
        t = path.time_of(jnp.log(cos) - jnp.log(sin))
        r = jnp.hypot(path.sigma(t), path.alpha(t))
        x0, eps = denoise(over(r, y) * y, t, cond)
        return over(cos, y) * eps - over(sin, y) * x0

    return field


def integrate(
    denoise: Denoiser,
    path: Path,
    x: Data,
    t0: ArrayLike,
    t1: ArrayLike,
    cond: Cond,
    rtol: ArrayLike = 1e-5,
    atol: ArrayLike = 1e-5,
    limit: ArrayLike = 1000,
) -> tuple[Data, Int[Array, ""]]:
    """x at time t0 carried to t1, and how often the network was called (six times a step tried, and once).

    Down in time this samples; up, it is the exact inversion. t0 and t1 are in [0, t_max], scalars or one
    value a sample, [b], and may be traced like the tolerances, which are of x / sqrt(alpha^2 +
    sigma^2). The network is asked at both ends: let the end be a small t where it was not trained on
    clean data. A sample that has not arrived after `limit` tried steps is nan.
    """
    (start, r0), (end, r1) = _angle(path, t0, x), _angle(path, t1, x)
    y = (x / over(r0, x)).astype(start.dtype)
    y, calls = _solve(_field(denoise, path, cond), y, start, end, rtol, atol, limit)
    return over(r1, y) * y, calls


def log_likelihood(
    denoise: Denoiser,
    path: Path,
    x: Data,
    t0: ArrayLike,
    t1: ArrayLike,
    cond: Cond,
    rng: Source | None = None,
    probes: int = 1,
    rtol: ArrayLike = 1e-5,
    atol: ArrayLike = 1e-5,
    limit: ArrayLike = 1000,
) -> tuple[Float[Array, " b"], Int[Array, ""]]:
    """log p(x) in nats, for x at the small time t0 (Song et al. 2021, section 4.3, eq. 39), and the calls.

    The density at t1, the noisy end, is taken as that of `samplers.initial_noise`: normal, as wide as
    data of unit variance are there. With `rng`, a key or one key a sample, the trace of the
    Jacobian is Hutchinson's estimate with `probes` normal probes, each the same along the whole
    way; without, it is exact and costs as many passes as x has values. Derivatives go forward through
    the network; each call counted has 1 + probes passes.

    Raises:
      ValueError: fewer than one probe.
    """
    if probes < 1:
        raise ValueError(f"Hutchinson's estimate needs at least one probe, not {probes}")
    field = _field(denoise, path, cond)
    (start, r0), (end, _) = _angle(path, t0, x), _angle(path, t1, x)
    y = (x / over(r0, x)).astype(start.dtype)
    size = int(np.prod(x.shape[1:]))
    if rng is None:
        basis = jnp.eye(size, dtype=y.dtype).reshape(size, 1, *x.shape[1:])
        z = jnp.broadcast_to(basis, (size, *x.shape))
        share = 1.0
    else:
        z = noise(rng, (x.shape[0], probes, *x.shape[1:]), y.dtype).swapaxes(0, 1)
        share = 1 / probes

    def augmented(state, theta):
        def along(z):
            slope, change = jax.jvp(lambda y: field(y, theta), (state[0],), (z,))
            return slope, (z * change).reshape(len(z), -1).sum(1)

        slope, traces = jax.vmap(along, out_axes=(None, 0))(z)
        return slope, share * traces.sum(0)

    state = (y, jnp.zeros(x.shape[:1], y.dtype))
    (y, gained), calls = _solve(augmented, state, start, end, rtol, atol, limit)
    prior = -(y**2).reshape(len(y), -1).sum(1) / 2 - size * np.log(2 * np.pi) / 2
    return prior + gained - size * jnp.log(r0), calls
