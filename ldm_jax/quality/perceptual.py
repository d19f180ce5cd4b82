"""LPIPS with weights of its published files, as a function of two batches."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax

from ldm_jax.models.lpips import LPIPS
from ldm_jax.weights import lpips


def distance(paths: Sequence[str | Path]) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """LPIPS of two batches of RGB pictures in [-1, 1].

    Raises:
      FileNotFoundError, ValueError: no file was named, one is not there, cannot be read, or is of another network.
    """
    if not paths:
        raise ValueError(
            "lpips needs two files, --lpips vgg16-397923af.pth,vgg.pth: the trunk of torchvision's model zoo, and the "
            "weights of version 0.1 from the lpips package (lpips/weights/v0.1)"
        )
    return partial(LPIPS().apply, lpips.load(paths))
