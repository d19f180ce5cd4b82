"""From noise to data: a grid of noise levels, and the one loop that walks down it.

A solver is one step between two noise levels p and q, given a denoiser. It knows neither path nor
network, so one solver serves them all; a grid is a `Point` of arrays from the noisy end to clean
data (sigma = 0). Everything but the number of steps is a value: other grids, seeds, guidance
scales, eta run the same compiled program.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Key

from ldm_jax.diffusion.process import Data, Path, Point, over
from ldm_jax.types import Cond, Denoiser, Prediction

SPACINGS = ("uniform", "karras", "log_snr", "leading", "trailing", "linspace")
Keep = Literal["x0", "x"]
Step = tuple[Data, Any, Data]  # x at q, the memory for the next step, the x0 estimated at p


class Solver(NamedTuple):
    """One step down the grid. Made by `solvers`."""

    init: Callable[[Data], Any]  # x -> memory
    # (denoise(x, t), x, p, q, memory, rng) -> (x at q, memory, x0 estimated at p)
    step: Callable[[Callable[[Array, Array], Prediction], Data, Point, Point, Any, Array], Step]


@functools.partial(jax.jit, static_argnums=range(8))  # one small program instead of dozens
def grid(
    path: Path,
    steps: int,
    spacing: str = "uniform",
    to_zero: bool = True,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    offset: int = 1,
) -> Point:
    """The noise levels of `steps` steps, [steps + 1]: from the path's noisy end to sigma = 0.

    On any path: "uniform" in t (on the path edm: Karras et al. 2022, eq. 5); "karras", their levels
    sigma / alpha by `rho`; "log_snr", uniform in lambda. The latter two stay within `sigma_min`,
    `sigma_max` where the path goes further, but begin at its noisy end. On the table of a ddpm
    path, integer times as in Lin et al. 2023, Table 2: "leading", "trailing", "linspace".
    "leading" starts `offset` entries late where the table is long enough, as Stable Diffusion does.
    `to_zero=False` ends at the path's own t = 0 instead, as CompVis' samplers do.

    Raises:
      ValueError: an unknown spacing, one of a table on a path without, too many or too few steps.
    """
    if spacing not in SPACINGS:
        raise ValueError(f"there is no spacing {spacing!r}; the choices are {list(SPACINGS)}")
    if steps < 1:
        raise ValueError(f"sampling needs at least one step, not {steps}")
    with jax.ensure_compile_time_eval():
        clean = bool(path.sigma(jnp.zeros(())) == 0)
    to_zero = to_zero or clean
    # A path that is still noisy at t = 0 asks the network there, before a last step to clean data.
    levels = steps if to_zero else steps + 1
    if spacing == "uniform":
        t = jnp.linspace(path.t_max, 0.0, levels + clean)[:levels]
    elif spacing in ("karras", "log_snr"):
        t = _by_level(path, levels, spacing == "karras", sigma_min, sigma_max, rho)
    else:
        t = jnp.asarray(_of_table(path, steps, levels, spacing, offset) / (path.steps - 1))
    end = [jnp.full(1, value, t.dtype) for value in (0, 1, 0)] if to_zero else [t[:0]] * 3
    return Point(*map(jnp.append, (t, path.alpha(t), path.sigma(t)), end))


def _by_level(path, levels, karras, sigma_min, sigma_max, rho):
    """Times from t_max down, spaced by sigma / alpha."""
    ends = jnp.array([path.t_max, 0.0])
    first, last = jnp.clip(path.sigma(ends) / path.alpha(ends), sigma_min, sigma_max)
    if karras:
        lam = -rho * jnp.log(jnp.linspace(first ** (1 / rho), last ** (1 / rho), levels))
    else:
        lam = -jnp.linspace(jnp.log(first), jnp.log(last), levels)
    return path.time_of(lam).at[0].set(path.t_max)


def _of_table(path, steps, levels, spacing, offset):
    """Integer times of the table, from its noisy end down."""
    if path.steps is None:
        raise ValueError(
            f"the spacing {spacing!r} picks entries of a table and this path has none; "
            "use 'uniform', 'karras' or 'log_snr'"
        )
    if steps > path.steps:
        raise ValueError(f"{steps} steps were asked of a table of {path.steps}")
    if spacing == "linspace":
        return np.round(np.linspace(path.steps - 1, 0, levels))
    if spacing == "trailing":
        picked = np.round(np.arange(path.steps, 0, -path.steps / steps))[:steps] - 1
    else:
        stride = path.steps // steps
        picked = np.arange(steps)[::-1] * stride + min(offset, stride - 1)
    return np.append(picked, np.zeros(levels - steps))


Source = (
    Key[Array, "..."] | Float[Array, "..."]
)  # of noise: a key, one a sample, or the noise itself


def noise(rng: Source, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """Standard normal noise; with one key a sample, [b], no sample depends on the others.

    Noise that is given in place of a key is returned, so that another implementation's can be used.

    Raises:
      ValueError: given noise of another shape.
    """
    if jnp.issubdtype(rng.dtype, jnp.floating):
        if rng.shape != shape:
            raise ValueError(f"noise of shape {rng.shape} was given where {shape} is needed")
        return rng.astype(dtype)
    if rng.ndim:
        return jax.vmap(lambda key: jax.random.normal(key, shape[1:], dtype))(rng)
    return jax.random.normal(rng, shape, dtype)


def initial_noise(points: Point, rng: Key[Array, "..."], shape: tuple[int, ...]) -> Data:
    """x at the noisy end: normal, as wide as data of unit variance are there.

    That is 1 on variance-preserving paths and flows, and sqrt(1 + sigma_max^2) on the path edm.
    """
    scale = jnp.sqrt(points.alpha[0] ** 2 + points.sigma[0] ** 2)
    x = noise(rng, shape, scale.dtype)
    return over(scale, x) * x


def sample(
    denoise: Denoiser,
    solver: Solver,
    points: Point,
    x_T: Data,
    rng: Source,
    cond: Cond,
    keep: Keep | tuple[Keep, ...] | None = None,
) -> tuple[Data, Any]:
    """Walks `x_T` down the grid; returns x at its end and what was to be kept of each step, [steps b *space c].

    That is keep="x0", the estimate of x0, "x", where the step began, or a tuple of these.

    The values of the grid are scalars, [steps + 1], or one a sample, [steps + 1, b]. `rng` is a
    key, one key a sample, [b], or the noise of every step, [steps b *space c].

    Raises:
      ValueError: noise for another number of steps.
    """
    steps = len(points.t) - 1
    given = jnp.issubdtype(rng.dtype, jnp.floating)
    if given and len(rng) != steps:
        raise ValueError(f"noise for {len(rng)} steps was given, the grid has {steps}")

    def asked(x, t):
        return denoise(x, jnp.broadcast_to(t, x.shape[:1]), cond)

    def body(carry, inputs):
        source, p, q = inputs
        source = source if given else fold(rng, source)
        x, memory, x0 = solver.step(asked, carry[0], p, q, carry[1], source)
        return (x, memory), jax.tree.map({"x0": x0, "x": carry[0]}.get, keep)

    fold = jax.vmap(jax.random.fold_in, (0, None)) if rng.ndim else jax.random.fold_in
    x_T = x_T.astype(points.alpha.dtype)
    p, q = Point(*(a[:-1] for a in points)), Point(*(a[1:] for a in points))
    sources = rng if given else jnp.arange(steps)
    (x, _), kept = lax.scan(body, (x_T, solver.init(x_T)), (sources, p, q))
    return x, kept
