"""Count, mean and covariance of features, in float64, batch by batch and mergeable.

For two sets with counts n, m, means a, b and scatters S, T (sums of (x - mean) (x - mean)^T) the union has

    mean     a + (b - a) m / (n + m)
    scatter  S + T + (b - a) (b - a)^T n m / (n + m)

(Chan, Golub & LeVeque 1983), which loses no digits where sums of squares would. The covariance is scatter / (n - 1).
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class Moments(NamedTuple):
    """The first two moments of a set of vectors."""

    count: int
    mean: Float[np.ndarray, " d"]
    scatter: Float[np.ndarray, "d d"]


def empty(dim: int) -> Moments:
    return Moments(0, np.zeros(dim), np.zeros((dim, dim)))


def of(x: Float[np.ndarray, "n d"]) -> Moments:
    """The moments of the rows of an array."""
    x = np.asarray(x, np.float64)
    mean = x.mean(0)
    return Moments(len(x), mean, (x - mean).T @ (x - mean))


def merge(a: Moments, b: Moments) -> Moments:
    """The moments of both sets together."""
    if not a.count or not b.count:
        return b if b.count else a
    count, step = a.count + b.count, b.mean - a.mean
    scatter = a.scatter + b.scatter + np.outer(step, step) * (a.count * b.count / count)
    return Moments(count, a.mean + step * (b.count / count), scatter)


def update(moments: Moments, x: Float[np.ndarray, "n d"]) -> Moments:
    """With another batch."""
    return merge(moments, of(x))


def covariance(moments: Moments) -> Float[np.ndarray, "d d"]:
    """The unbiased covariance.

    Raises:
      ValueError: fewer than two vectors.
    """
    if moments.count < 2:
        raise ValueError(f"a covariance needs two vectors, not {moments.count}")
    return moments.scatter / (moments.count - 1)
