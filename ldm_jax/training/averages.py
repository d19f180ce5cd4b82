"""Moving averages of the parameters: one, or several of different profiles in one state.

With a fixed decay b, which is warmed up, the parameters of n steps ago weigh b^n. A power-function average (Karras et
al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", section 3.1) lets those of step tau weigh
tau^gamma, so that its width is a share of the time trained so far, at every step t the same:

    average(t) = beta(t) average(t - 1) + (1 - beta(t)) parameters(t),    beta(t) = (1 - 1/t)^(gamma + 1)

`posthoc` makes averages of other widths out of several of these.

A state with one fixed decay, a plain number, holds an average as a tree like the parameters; one with several holds a
dict of such trees by their names: "0.9999", "power_0.05".
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ldm_jax.training import posthoc
from ldm_jax.types import Params

POWER = "power_"  # how names of power-function averages begin; the rest is sigma_rel
NAME = rf"({POWER})?\d[\d.e+-]*"  # no module is called so


class Average(NamedTuple):
    """One of several: `move(held, params, step)` is the average after one more update than `step`."""

    name: str
    move: Callable[[Params, Params, Int[Array, ""]], Params]


Averages = float | Sequence[Average]  # one fixed decay, or several by name


def warmed_up(limit: float, step: Int[Array, ""]) -> Float[Array, ""]:
    """The decay after `step` updates: min(limit, (1 + n) / (10 + n)); CompVis' LitEma."""
    return jnp.minimum(limit, (1.0 + step) / (10.0 + step))


def _fixed(decay: float) -> Callable[[Params, Params, Int[Array, ""]], Params]:
    def move(held, params, step):
        # A sum and a difference, so that the average of what does not move keeps its bits.
        weight = 1.0 - warmed_up(decay, step)
        return jax.tree.map(lambda old, new: old + weight * (new - old), held, params)

    return move


def fixed(decay: float) -> Average:
    """The average with a fixed decay in [0, 1)."""
    return Average(str(decay), _fixed(decay))


def power(sigma_rel: float) -> Average:
    """The power-function average of a relative width in (0, 0.288]; see `posthoc.exponent`.

    Raises:
      ValueError: there is no such profile.
    """
    gamma = posthoc.exponent(sigma_rel)

    def move(held, params, step):
        # 1 - (1 - 1/t)^(gamma + 1) without the cancellation, which float32 could not bear.
        share = -jnp.expm1((gamma + 1.0) * jnp.log1p(-1.0 / (1.0 + step)))
        return jax.tree.map(
            lambda old, new: old + (share * (new - old)).astype(old.dtype), held, params
        )

    return Average(f"{POWER}{sigma_rel}", move)


def start(of: Averages, params: Params) -> Params:
    """The averages at step 0, all of them the parameters."""
    if isinstance(of, float):
        return jax.tree.map(jnp.copy, params)
    return {average.name: jax.tree.map(jnp.copy, params) for average in of}


def moved(of: Averages, held: Params, params: Params, step: Int[Array, ""]) -> Params:
    """The averages after an update to `params`, before which there were `step`."""
    if isinstance(of, float):
        return _fixed(of)(held, params, step)
    return {average.name: average.move(held[average.name], params, step) for average in of}


def first(of: Averages, held: Params) -> Params:
    """The average that is evaluated while a run trains."""
    return held if isinstance(of, float) else held[of[0].name]


def named(keys: Iterable[str]) -> tuple[str, ...]:
    """Those names at the top of a checkpoint's average which are names of averages; none if it holds one alone."""
    return tuple(key for key in keys if re.fullmatch(NAME, key))


def width(name: str) -> float | None:
    """The sigma_rel of a power-function average; None for the name of another one."""
    return float(name.removeprefix(POWER)) if name.startswith(POWER) else None
