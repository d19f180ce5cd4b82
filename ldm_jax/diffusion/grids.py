"""Grids of noise levels: from a path's noisy end to clean data, one level more than there are steps.

Most are defined in terms of the ratio sigma / alpha, which is the sigma of Karras et al. and k-diffusion on every path.

| spacing                     | uniform in, or what it is                           | source                       |
|-----------------------------|-----------------------------------------------------|------------------------------|
| uniform                     | t; on the path edm these are Karras' levels         | Karras et al. 2022, eq. 5    |
| karras                      | ratio^(1 / rho)                                     | Karras et al. 2022, eq. 5    |
| exponential, log_snr        | log ratio, half the log-SNR                         | Lu et al. 2022 (DPM-Solver)  |
| cosine                      | arctan ratio, the angle of alpha and sigma          | Nichol & Dhariwal 2021       |
| beta                        | quantiles of a Beta distribution                    | Lee et al. 2024              |
| ays                         | lists found by optimisation, 10 steps; else between | Sabour et al. 2024           |
| leading, trailing, linspace | integer times of a table                            | Lin et al. 2023, Table 2     |
| lcm                         | integer times that a consistency model was taught   | Luo et al. 2023, section 4.3 |
| list                        | the user's                                          |                              |

Grids are computed in float64 and are data: another grid of as many steps runs the same compiled program.
"""

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from scipy.stats import beta as beta_distribution

from ldm_jax.diffusion.process import Path, Point

# sigma / alpha for 10 steps, from the authors' page: the last of the 11 is where a grid ends that does not go to 0.
AYS = {
    "sd1": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "svd": (700.00, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}
Times = tuple[Literal["t", "ratio", "sigma"], np.ndarray]  # in which measure, [levels], falling


def grid(
    path: Path,
    steps: int,
    spacing: str = "uniform",
    to_zero: bool = True,
    shift: float | int | Mapping[str, Any] = 1.0,
    terminal: float | int = 0.0,
    restarts: Sequence[Sequence[float | int]] = (),
    **options: Any,
) -> Point:
    """The noise levels of `steps` steps, [steps + 1]: from the path's noisy end to sigma = 0.

    `options` are those of the spacing, a function of this module. `to_zero=False` ends at the path's own t = 0 instead,
    as CompVis' samplers do, or where the spacing says. `shift` multiplies sigma / alpha, as Stable Diffusion 3 does
    (Esser et al. 2024, eq. 23), for paths from pure noise to clean data: a number, or the arguments of
    `resolution_shift`. `terminal` > 0 then stretches the times so that the last before 0 is there (LTX-Video).
    `restarts` are intervals (lo, hi, steps, times) of sigma / alpha that are walked through again, for the solver
    `restart`: from the level nearest to lo back up to hi, and down in Karras' levels; they add steps.

    Raises:
      ValueError: an unknown spacing or option, one of a table on a path without, too many or too few steps, levels that
        do not fall or that the path does not have.
    """
    if spacing not in SPACINGS:
        raise ValueError(f"there is no spacing {spacing!r}; the choices are {list(SPACINGS)}")
    takes = options_of(spacing)
    if wrong := sorted(set(options) - set(takes)):
        raise ValueError(
            f"the spacing {spacing!r} has no option {wrong[0]!r}; its options are {takes}"
        )
    if steps < 1:
        raise ValueError(f"sampling needs at least one step, not {steps}")
    ends = _ends(path)
    clean = ends.least == 0
    to_zero = to_zero or clean
    # A path that is still noisy at t = 0 asks the network there, before a last step to clean data.
    levels = steps if to_zero else steps + 1
    measure, at = SPACINGS[spacing](ends._replace(steps=steps, levels=levels), **options)
    scale = resolution_shift(**shift) if isinstance(shift, Mapping) else float(shift)
    if (scale != 1.0 or terminal) and not (clean and ends.most == math.inf):
        raise ValueError(
            "shift and terminal are for paths from pure noise to clean data, such as rectified_flow"
        )
    if not 0 < scale < math.inf or not 0 <= terminal < 1:
        raise ValueError(f"shift = {scale} must be positive and {terminal = } in [0, 1)")
    points = _points(path, measure, to_zero, jnp.asarray(at), scale, float(terminal))
    return _with_restarts(path, points, restarts) if len(restarts) else points


def resolution_shift(
    tokens: int,
    base: float = 0.5,
    most: float = 1.15,
    base_tokens: int = 256,
    most_tokens: int = 4096,
    form: str = "exponential",
) -> float:
    """The shift for a number of tokens: mu is linear in it, and the shift is e^mu or mu (Esser et al. 2024; FLUX).

    Raises:
      ValueError: an unknown form, or two equal numbers of tokens.
    """
    if form not in ("exponential", "linear") or base_tokens == most_tokens:
        raise ValueError(
            f"{form=} must be 'exponential' or 'linear' and {base_tokens=}, {most_tokens=} two numbers"
        )
    mu = base + (most - base) * (tokens - base_tokens) / (most_tokens - base_tokens)
    return math.exp(mu) if form == "exponential" else mu


def options_of(spacing: str) -> list[str]:
    """The options of a spacing, beside those of every grid."""
    return list(inspect.signature(SPACINGS[spacing]).parameters)[1:]


class Ends(NamedTuple):
    """What a spacing is made for: a path's noisiest and cleanest level, and how many it makes."""

    path: Path
    most: float  # sigma / alpha, inf for pure noise
    least: float
    sigma_most: float
    sigma_least: float
    steps: int = 0
    levels: int = 0  # as many as steps, or one more where the grid ends before sigma = 0


def _ends(path: Path) -> Ends:
    with jax.ensure_compile_time_eval():  # numbers, also while a caller is being traced
        t = jnp.array([path.t_max, 0.0])
        alpha, sigma = np.asarray(path.alpha(t), float), np.asarray(path.sigma(t), float)
    most = sigma[0] / alpha[0] if alpha[0] else math.inf
    return Ends(path, most, sigma[1] / alpha[1], sigma[0], sigma[1])


def uniform(ends: Ends, t_min: float | None = None) -> Times:
    """Uniform in t, down to `t_min` before the last step, if it is given.

    diffusers' FlowMatchEulerDiscreteScheduler goes down to 0.001 before 0 where a pipeline does not say otherwise.
    """
    if t_min is not None:
        if not 0 < t_min < ends.path.t_max:
            raise ValueError(f"{t_min=} must be in (0, {ends.path.t_max})")
        return "t", np.linspace(ends.path.t_max, t_min, ends.levels)
    count = ends.levels + (ends.least == 0)
    return "t", np.linspace(ends.path.t_max, 0.0, count)[: ends.levels]


def _between(ends, of, lo, hi):
    """The noisiest and the cleanest level within these and the path's."""
    if of not in ("ratio", "sigma"):
        raise ValueError(f"there is no {of=}; the choices are 'ratio' and 'sigma'")
    if not 0 < lo < hi:
        raise ValueError(f"0 < sigma_min = {lo} < sigma_max = {hi} must hold")
    path = (ends.least, ends.most) if of == "ratio" else (ends.sigma_least, ends.sigma_most)
    first, last = np.clip(path[1], lo, hi), np.clip(path[0], lo, hi)
    if not first > last:
        raise ValueError(f"the path has no levels between sigma_min = {lo} and sigma_max = {hi}")
    return float(first), float(last)


def _from_the_noisy_end(levels):
    """Whatever sigma_max: sampling begins where the path does."""
    return np.append(np.inf, levels[1:])


def karras(
    ends: Ends,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    of: str = "ratio",
) -> Times:
    """Karras et al. 2022, eq. 5, in sigma / alpha, within `sigma_min`, `sigma_max` where the path goes further.

    diffusers' FlowMatchEulerDiscreteScheduler takes it of a flow's sigma instead, between 0.001 and 1: `of="sigma"`.
    """
    if rho <= 0:
        raise ValueError(f"{rho=} must be positive; Karras et al. use 7")
    first, last = (v ** (1 / rho) for v in _between(ends, of, sigma_min, sigma_max))
    return of, _from_the_noisy_end(np.linspace(first, last, ends.levels) ** rho)


def exponential(
    ends: Ends,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    of: str = "ratio",
) -> Times:
    """Uniform in log(sigma / alpha), which is uniform in the log-SNR; `of="sigma"` as for karras."""
    first, last = np.log(_between(ends, of, sigma_min, sigma_max))
    return of, _from_the_noisy_end(np.exp(np.linspace(first, last, ends.levels)))


def cosine(ends: Ends, sigma_min: float = 0.002, sigma_max: float = math.inf) -> Times:
    """Uniform in arctan(sigma / alpha): uniform times of the cosine path, on any path."""
    first, last = np.arctan(_between(ends, "ratio", sigma_min, sigma_max))
    return "ratio", _from_the_noisy_end(np.tan(np.linspace(first, last, ends.levels)))


def beta(
    ends: Ends,
    a: float = 0.6,
    b: float = 0.6,
    of: str = "t",
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
) -> Times:
    """Quantiles of a Beta(a, b) distribution of times (Lee et al. 2024): most steps at both ends.

    diffusers deviates: its `use_beta_sigmas` are quantiles of sigma / alpha between two values of it (`of="ratio"`), or
    of a flow's sigma (`of="sigma"`).
    """
    if a <= 0 or b <= 0:
        raise ValueError(f"{a=} and {b=} must be positive; Lee et al. use 0.6")
    if of == "t":
        share = 1 - np.arange(ends.levels) / max(ends.steps, 1)
        return of, ends.path.t_max * beta_distribution.ppf(share, a, b)
    first, last = _between(ends, of, sigma_min, sigma_max)
    share = beta_distribution.ppf(1 - np.linspace(0, 1, ends.levels), a, b)
    return of, _from_the_noisy_end(last + share * (first - last))


def ays(ends: Ends, model: str = "sd1") -> Times:
    """Align Your Steps (Sabour et al. 2024): for other numbers of steps, log-linear between the levels listed."""
    if model not in AYS:
        raise ValueError(f"there is no list for {model=}; the choices are {sorted(AYS)}")
    listed = AYS[model]
    if listed[0] > 1.01 * ends.most:
        raise ValueError(
            f"the list for {model!r} begins at sigma / alpha = {listed[0]} and the path at {ends.most:.4g}"
        )
    where = np.linspace(0, 1, ends.steps + 1)[: ends.levels]
    return "ratio", np.exp(np.interp(where, np.linspace(0, 1, len(listed)), np.log(listed)))


def _table(ends, name):
    """The number of entries."""
    size = ends.path.steps
    if size is None:
        raise ValueError(
            f"the spacing {name!r} picks entries of a table and this path has none; "
            "use 'uniform', 'karras' or 'log_snr'"
        )
    if ends.steps > size:
        raise ValueError(f"{ends.steps} steps were asked of a table of {size}")
    return size


def _of_entries(ends, picked):
    """The grid through these entries, and to the first where it ends in the table."""
    picked = np.append(picked, np.zeros(ends.levels - len(picked)))
    return "t", picked / (ends.path.steps - 1)


def leading(ends: Ends, offset: int = 1, extra: bool = False) -> Times:
    """Every k-th entry, from `offset` on where the table is long enough, as Stable Diffusion does.

    `extra` leaves room for one step more, as diffusers' DPM-Solver family does.
    """
    stride = _table(ends, "leading") // (ends.steps + extra)
    if offset < 0 or stride == 0:
        raise ValueError(f"{offset=} must not be negative, nor the table too short")
    picked = np.arange(extra, ends.steps + extra)[::-1] * stride + min(offset, stride - 1)
    return _of_entries(ends, picked)


def trailing(ends: Ends) -> Times:
    """Every k-th entry, from the last one down."""
    size = _table(ends, "trailing")
    return _of_entries(ends, np.round(np.arange(size, 0, -size / ends.steps))[: ends.steps] - 1)


def linspace(ends: Ends, rounded: bool = True, extra: bool = False) -> Times:
    """From the last entry to the first; without rounding as diffusers' Euler.

    `extra` makes one more and leaves the first entry out, as diffusers' DPM-Solver family does.
    """
    size = _table(ends, "linspace")
    last_too = extra and ends.levels == ends.steps
    picked = np.linspace(size - 1, 0, ends.levels + last_too)[: ends.levels]
    return "t", (np.round(picked) if rounded else picked) / (size - 1)


def lcm(ends: Ends, original: int = 50) -> Times:
    """Of the `original` times that a consistency model was distilled at (Luo et al. 2023), those for fewer steps."""
    size = _table(ends, "lcm")
    if not ends.steps <= original <= size:
        raise ValueError(f"steps = {ends.steps} <= {original=} <= {size} must hold")
    taught = (np.arange(original)[::-1] + 1) * (size // original) - 1
    where = np.floor(np.linspace(0, original, ends.steps, endpoint=False)).astype(int)
    return _of_entries(ends, taught[where])


def listed(
    ends: Ends,
    ratios: Sequence[float | int] = (),
    times: Sequence[float | int] = (),
    entries: Sequence[float | int] = (),
) -> Times:
    """The user's levels, falling: as sigma / alpha, as times in [0, 1], or as entries of a table.

    As many as steps, before the last step to 0; one more where the grid ends before.
    """
    given = [v for v in (ratios, times, entries) if len(v)]
    if len(given) != 1 or len(given[0]) != ends.levels:
        raise ValueError(
            f"a list of {ends.levels} levels is needed for {ends.steps} steps, as ratios, times or entries; "
            f"given are {len(ratios)}, {len(times)} and {len(entries)}"
        )
    at = np.asarray(given[0], float)
    if len(entries):
        at = at / (_table(ends, "list") - 1)
    top = ends.most if len(ratios) else ends.path.t_max
    if np.any(np.diff(at) >= 0) or not 0 <= at[-1] <= at[0] <= top * 1.001:
        raise ValueError(f"the levels of a list must fall, from at most {top:.4g} to 0: {given[0]}")
    return ("ratio" if len(ratios) else "t"), at


SPACINGS: dict[str, Callable[..., Times]] = {
    "uniform": uniform,
    "karras": karras,
    "log_snr": exponential,
    "exponential": exponential,
    "cosine": cosine,
    "beta": beta,
    "ays": ays,
    "leading": leading,
    "trailing": trailing,
    "linspace": linspace,
    "lcm": lcm,
    "list": listed,
}


@functools.partial(jax.jit, static_argnums=range(3))  # one small program instead of dozens
def _points(path, measure, to_zero, at, scale, terminal):
    if measure == "ratio":
        t = path.time_of(-jnp.log(at))
    elif measure == "sigma":
        t = _time_of_sigma(path, at)
    else:
        t = at
    if path.steps is None:
        lam = jnp.log(path.alpha(t)) - jnp.log(path.sigma(t)) - jnp.log(scale)
        t = jnp.where(scale == 1.0, t, path.time_of(lam))
        t = jnp.where(terminal > 0, 1 - (1 - t) * (1 - terminal) / (1 - t[-1]), t)
    end = [jnp.full(1, value, t.dtype) for value in (0, 1, 0)] if to_zero else [t[:0]] * 3
    return Point(*map(jnp.append, (t, path.alpha(t), path.sigma(t)), end))


def _time_of_sigma(path, sigma):
    """The inverse of a path's sigma, by bisection."""

    def halve(_, between):
        lo, hi = between
        t = (lo + hi) / 2
        below = path.sigma(t) < sigma
        return jnp.where(below, t, lo), jnp.where(below, hi, t)

    ends = jnp.zeros_like(sigma), jnp.full_like(sigma, path.t_max)
    t = lax.fori_loop(0, 50, halve, ends)[1]
    return jnp.where(jnp.isinf(sigma), path.t_max, t)


def _with_restarts(path, points, restarts):
    """The grid, with each interval walked through again where it was passed."""
    ratio = np.append(np.asarray(points.sigma / points.alpha, float)[1:], 0.0)  # from level 1 on
    inserted: dict[int, list[Point]] = {}
    for lo, hi, steps, times in restarts:
        with np.errstate(divide="ignore"):
            gap = np.abs(np.log(ratio[:-1]) - math.log(lo)) if lo > 0 else np.array([math.inf])
        at = int(np.argmin(gap)) + 1
        bottom = ratio[at - 1]
        if not (np.isfinite(gap.min()) and bottom < hi) or steps < 1 or times < 1:
            raise ValueError(
                f"a restart (lo, hi, steps, times) = {(lo, hi, steps, times)} must rise from a level of the grid, "
                f"here {bottom:.4g}, to hi, in at least one step and once"
            )
        levels = np.linspace(hi ** (1 / 7), bottom ** (1 / 7), int(steps) + 1)[:-1] ** 7
        again = _points(path, "ratio", False, jnp.asarray(levels), 1.0, 0.0)
        same = Point(*(a[at : at + 1] for a in points))
        inserted[at] = inserted.get(at, []) + [again, same] * int(times)
    parts = []
    for i in range(len(points.t)):
        parts += [Point(*(a[i : i + 1] for a in points)), *inserted.get(i, [])]
    return Point(*(jnp.concatenate(a) for a in zip(*parts, strict=True)))
