"""The spacings of grids: where the noise levels lie, whatever the path.

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
"""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from scipy import special

from ldm_jax.diffusion.process import Path

# sigma / alpha for 10 steps, from the authors' page: the last of the 11 is where a grid ends that does not go to 0.
AYS = {
    "sd1": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "svd": (700.00, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}
Times = tuple[Literal["t", "ratio", "sigma"], np.ndarray]  # in which measure, [levels], falling


class Ends(NamedTuple):
    """What a spacing is made for: a path's noisiest and cleanest level, and how many it makes."""

    path: Path
    most: float  # sigma / alpha, inf for pure noise
    least: float
    sigma_most: float
    sigma_least: float
    steps: int = 0
    levels: int = 0  # as many as steps, or one more where the grid ends before sigma = 0


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
        return of, ends.path.t_max * special.betaincinv(a, b, share)
    first, last = _between(ends, of, sigma_min, sigma_max)
    share = special.betaincinv(a, b, 1 - np.linspace(0, 1, ends.levels))
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


def options_of(spacing: str) -> list[str]:
    """The options of a spacing, beside those of every grid."""
    return list(inspect.signature(SPACINGS[spacing]).parameters)[1:]
