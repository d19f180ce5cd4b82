"""Power-function averages of any width, from those that were kept: Karras et al. 2024, section 3 and appendix C.

An average of exponent gamma at step t is the integral of the parameters over the profile

    p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1),    0 <= tau <= t,

where the parameters of step n count from n - 1 to n: then this is what `averages.power` computes, exactly. The standard
deviation of tau by p, as a share of t, is the width sigma_rel (section 3.1):

    sigma_rel = (gamma + 1)^(1/2) / ((gamma + 2) (gamma + 3)^(1/2)).

A profile that was not tracked is approximated by a weighted sum of the profiles of the averages that were kept,
with the least squared difference: a linear system whose entries are the integrals of products of two profiles.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

WIDEST = 1.0 / math.sqrt(12.0)  # of gamma = 0: the mean of all steps


class Profile(NamedTuple):
    """Of a power-function average at a step, from 1 on."""

    step: int
    gamma: float


def exponent(sigma_rel: float) -> float:
    """The gamma of a width: the largest root of (gamma + 2)^2 (gamma + 3) sigma_rel^2 = gamma + 1.

    Raises:
      ValueError: a width that is not in (0, 1/sqrt(12)].
    """
    if not 0.0 < sigma_rel <= WIDEST:
        raise ValueError(
            f"sigma_rel = {sigma_rel} is no width of a power-function average; give a number above 0 and at most "
            f"{math.floor(WIDEST * 1000) / 1000}, such as 0.05"
        )
    inverse = sigma_rel**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return float(max(roots.real))


def relative_width(gamma: float) -> float:
    """The sigma_rel of an exponent."""
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def product(a: Profile, b: Profile) -> float:
    """The integral of the product of two profiles, over the shorter one's time."""
    if a.step > b.step:
        a, b = b, a
    together = a.gamma + b.gamma + 1
    return (a.gamma + 1) * (b.gamma + 1) / together * (a.step / b.step) ** b.gamma / b.step


def weights(kept: Sequence[Profile], wanted: Profile) -> tuple[Float[np.ndarray, " n"], float]:
    """The weights of the averages that were kept, and how far their sum is from the profile that is wanted.

    The latter is the norm of the difference over that of the wanted profile.
    """
    norms = np.sqrt([product(a, a) for a in kept])
    norm = math.sqrt(product(wanted, wanted))
    between = np.array([[product(a, b) for b in kept] for a in kept]) / np.outer(norms, norms)
    towards = np.array([product(a, wanted) for a in kept]) / (norms * norm)
    found = np.linalg.lstsq(between, towards, rcond=None)[0]
    square = 1.0 - 2.0 * found @ towards + found @ between @ found
    return found * norm / norms, math.sqrt(max(square, 0.0))
