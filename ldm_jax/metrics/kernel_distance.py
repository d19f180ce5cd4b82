"""The kernel inception distance: an unbiased squared maximum mean discrepancy between two sets of features.

    k(x, y) = (x.y / d + 1)^3
    MMD^2 = mean of k(x, x') over pairs + mean of k(y, y') over pairs - 2 mean of k(x, y)

where pairs are of different vectors (Binkowski et al. 2018, section 4). It is the mean over random subsets; the
subsets are those that torch-fidelity draws, so that equal features give equal numbers.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

SEED = 2020  # of torch-fidelity

Features = Float[np.ndarray, "n d"]


class KernelDistance(NamedTuple):
    """Mean and standard deviation over subsets."""

    mean: float
    std: float


def kernel(x: Features, y: Features) -> Float[np.ndarray, "n m"]:
    return (x @ y.T / x.shape[1] + 1) ** 3


def mmd(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "n d"]) -> float:
    """The unbiased estimate from two sets of one size; it may be negative."""
    n = len(x)
    within = sum((k.sum() - np.trace(k)) / (n * (n - 1)) for k in (kernel(x, x), kernel(y, y)))
    return float(within - 2 * kernel(x, y).mean())


def distance(
    x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"], subset: int = 1000, subsets: int = 100
) -> KernelDistance:
    """KID over `subsets` subsets of `subset` vectors.

    Raises:
      ValueError: fewer vectors than a subset takes.
    """
    if not 2 <= subset <= min(len(x), len(y)):
        raise ValueError(
            f"KID takes subsets of {subset} pictures of {len(x)} and {len(y)}; a subset has 2 to "
            f"{min(len(x), len(y))}: give more pictures, or smaller subsets"
        )
    rng = np.random.RandomState(SEED)
    x, y = x.astype(np.float64), y.astype(np.float64)
    values = []
    for _ in range(subsets):
        rows = [rng.choice(len(of), subset, replace=False) for of in (x, y)]
        values.append(mmd(x[rows[0]], y[rows[1]]))
    return KernelDistance(float(np.mean(values)), float(np.std(values)))
