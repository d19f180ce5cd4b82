"""Fidelity and diversity apart: precision, recall, density and coverage, by nearest neighbours among features.

Each real picture i has a ball that reaches to its k-th nearest real neighbour, each generated picture j one that
reaches to its k-th nearest generated neighbour.

    precision   the share of generated pictures that lie in a ball of a real one          k = 3
    recall      the share of real pictures that lie in a ball of a generated one           k = 3
    density     the mean number of real balls that a generated picture lies in, over k     k = 5
    coverage    the share of real balls with a generated picture in them                   k = 5

Precision and recall: Kynkäänniemi et al. 2019, eqs. 1-3, where the border belongs to the ball. Density and coverage:
Naeem et al. 2020, eqs. 3 and 4, where it does not.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

MANIFOLD, DENSE = 3, 5  # neighbours for precision and recall, for density and coverage
ROWS = 1024  # distances are computed for so many vectors at a time


class Neighbours(NamedTuple):
    """The four, as fractions; density may exceed 1."""

    precision: float
    recall: float
    density: float
    coverage: float


def distances(
    x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"]
) -> Iterator[Float[np.ndarray, "_rows m"]]:
    """Euclidean distances of blocks of rows of x to all of y, in float64."""
    squares = np.square(y).sum(1)
    for start in range(0, len(x), ROWS):
        rows = x[start : start + ROWS]
        square = np.square(rows).sum(1)[:, None] + squares - 2 * rows @ y.T
        yield np.sqrt(square.clip(0))


def radii(x: Float[np.ndarray, "n d"], ks: tuple[int, ...]) -> Float[np.ndarray, "n _k"]:
    """How far the k-th nearest other vector is, for each k."""
    # Each is its own nearest: the k-th other one is number k from 0.
    return np.concatenate([np.partition(d, ks, axis=1)[:, list(ks)] for d in distances(x, x)])


def measure(real: Float[np.ndarray, "n d"], generated: Float[np.ndarray, "m d"]) -> Neighbours:
    """All four of two sets of features.

    Raises:
      ValueError: a set with too few vectors to have so many neighbours.
    """
    if min(len(real), len(generated)) <= DENSE:
        raise ValueError(
            f"precision, recall, density and coverage look at {DENSE} neighbours and need {DENSE + 1} pictures on "
            f"either side; there are {len(real)} real and {len(generated)} generated ones"
        )
    real, generated = real.astype(np.float64), generated.astype(np.float64)
    near, wide = radii(real, (MANIFOLD, DENSE)).T
    own = radii(generated, (MANIFOLD,))[:, 0]
    inside, counts = [], []
    recalled, nearest = np.zeros(len(real), bool), np.full(len(real), np.inf)
    for start, d in zip(range(0, len(generated), ROWS), distances(generated, real), strict=True):
        inside.append((d <= near).any(1))
        counts.append((d < wide).sum(1))
        recalled |= (d <= own[start : start + ROWS, None]).any(0)
        nearest = np.minimum(nearest, d.min(0))
    return Neighbours(
        precision=float(np.concatenate(inside).mean()),
        recall=float(recalled.mean()),
        density=float(np.concatenate(counts).mean() / DENSE),
        coverage=float((nearest < wide).mean()),
    )
