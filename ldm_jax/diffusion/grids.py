"""Grids of noise levels: from a path's noisy end to clean data, one level more than there are steps.

Where the levels lie is up to the `spacings`. Grids are computed in float64 and are data: another grid of as many steps
runs the same compiled program.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ldm_jax.diffusion.process import Path, Point, concrete
from ldm_jax.diffusion.spacings import SPACINGS, Ends, options_of


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

    `options` are those of the spacing, a function of `spacings`. `to_zero=False` ends at the path's own t = 0 instead,
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


def _ends(path: Path) -> Ends:
    with concrete():
        t = jnp.array([path.t_max, 0.0])
        alpha, sigma = np.asarray(path.alpha(t), float), np.asarray(path.sigma(t), float)
    most = sigma[0] / alpha[0] if alpha[0] else math.inf
    return Ends(path, most, sigma[1] / alpha[1], sigma[0], sigma[1])


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
