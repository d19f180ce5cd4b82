"""The weights of LPIPS out of its published files."""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from ldm_jax.models.lpips import LPIPS
from ldm_jax.types import Params
from ldm_jax.weights import features, table

SIDE = 32  # pixels, for shapes alone


def shapes() -> Params:
    """Of the variables of `models.lpips.LPIPS`."""
    example = jnp.zeros((1, SIDE, SIDE, 3))
    return jax.eval_shape(LPIPS().init, jax.random.key(0), example, example)


def load(paths: Sequence[str | Path]) -> Params:
    """The variables of `models.lpips.LPIPS` from a file of both its parts, or from one each; see `features`.

    Raises:
      FileNotFoundError, ValueError: a file is not there, cannot be read, or is of another network.
    """
    tensors = features.read(paths)
    try:
        rows = features.lpips_table(tensors)
        return table.load(rows, shapes(), tensors, features.LPIPS_IGNORED)
    except table.Mismatch as error:
        raise ValueError(
            f"{', '.join(map(str, paths))}: not the trunk and the weights of LPIPS on VGG16 ({error})"
        ) from error
