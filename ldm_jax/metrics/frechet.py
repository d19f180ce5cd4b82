"""The Fréchet distance of two Gaussians, in float64: FID on features of a network, sFID on its spatial features.

    d = |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))                       Heusel et al. 2017, eq. 6

The eigenvalues of C1 C2 are those of the symmetric R C2 R with R = C1^(1/2), so that the trace of the root is the sum
of the roots of the eigenvalues of a symmetric matrix: no complex parts, no offset for singular products.
"""

import numpy as np
from scipy import linalg

from ldm_jax.metrics import moments
from ldm_jax.metrics.moments import Moments


def distance(a: Moments, b: Moments) -> float:
    """FID of two sets of features; 0 where mean and covariance agree.

    Raises:
      ValueError: features of different lengths, or a set of fewer than two vectors.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"features of {len(a.mean)} and {len(b.mean)} numbers cannot be compared; "
            "take the same network for both"
        )
    first, second = moments.covariance(a), moments.covariance(b)
    values, vectors = linalg.eigh(first)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    product = linalg.eigvalsh(root @ second @ root)
    gap = np.square(a.mean - b.mean).sum()
    return float(gap + np.trace(first) + np.trace(second) - 2 * np.sqrt(product.clip(0)).sum())
