"""The Inception Score (Salimans et al. 2016, section 4): exp of the mean over pictures of KL(p(y | x) || p(y)).

The set is shuffled and cut into splits, each with a p(y) of its own; the score is the mean over them. The order is that
of torch-fidelity, so that equal logits give equal numbers.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import special

SEED = 2020  # of torch-fidelity


class Score(NamedTuple):
    """Mean and standard deviation over splits."""

    mean: float
    std: float


def score(logits: Float[np.ndarray, "n k"], splits: int = 10) -> Score:
    """The score of a set of pictures, from 1 to the number of classes.

    Raises:
      ValueError: fewer pictures than splits.
    """
    n = len(logits)
    if not 1 <= splits <= n:
        raise ValueError(f"the Inception Score cuts {n} pictures into {splits} parts; give more")
    order = np.random.RandomState(SEED).permutation(n)
    log_p = special.log_softmax(logits[order].astype(np.float64), axis=1)
    values = []
    for i in range(splits):
        part = log_p[i * n // splits : (i + 1) * n // splits]
        log_mean = special.logsumexp(part, axis=0) - np.log(len(part))
        values.append(np.exp((np.exp(part) * (part - log_mean)).sum(1).mean()))
    return Score(float(np.mean(values)), float(np.std(values)))
