"""The section `data.buckets`: which sizes pictures are trained in, and which picture in which."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from beartype.door import is_bearable
from ml_collections import ConfigDict

from ldm_jax.build import parts
from ldm_jax.build.sections import checked
from ldm_jax.data import buckets as of_data

BUDGET = dict(pixels=int, step=int, ratio=float)


def sizes(config: ConfigDict) -> tuple[of_data.Size, ...]:
    """The buckets that a config names or allows; none where it has no such section.

    Raises:
      ValueError: neither sizes nor a budget of pixels, or a size twice.
    """
    given = parts.data(config).get("buckets")
    if not given:
        return ()
    if isinstance(given, dict):
        return of_data.within(**checked("data.buckets", given, BUDGET, ("pixels", "step")))
    if not is_bearable(given, tuple[tuple[int, int], ...]) or min(map(min, given)) < 1:
        raise ValueError(
            f"data.buckets = {given!r} is neither a list of (height, width) nor a budget such as "
            "dict(pixels=512 * 512, step=64)"
        )
    if len(set(given)) < len(given):
        raise ValueError(f"data.buckets = {given!r} names a size twice; leave one of them out")
    return given


def batches(config: ConfigDict, of: Any, fields: Sequence[str], **more: Any) -> Any:
    """The input pipeline that is trained on: `parts.batches`, or where `data.buckets` is set a batch a bucket.

    Of a budget, the buckets that have no batch of pictures are left out.

    Raises:
      ValueError: a source that does not know the sizes of its pictures, or a bucket without a batch of them.
    """
    wanted = sizes(config)
    if not wanted:
        return parts.batches(config, of, fields, **more)
    if not isinstance(of, of_data.Sized):
        raise ValueError(
            f"data.buckets needs the sizes of the pictures, which {of.name} does not know; give a folder of pictures, "
            "or leave data.buckets out"
        )
    given, batch = of.sizes(), parts.data(config)["batch"]
    if isinstance(parts.data(config)["buckets"], dict):
        wanted = of_data.occupied(given, wanted, batch)
    options = parts.reading(config, of, fields, **more)
    options.pop("size")
    return of_data.bucketed(of, buckets=wanted, members=of_data.nearest(given, wanted), **options)


def shapes(of: Any) -> list[dict[str, np.ndarray]]:
    """A row of a batch of each bucket; none where there are no buckets."""
    return of.examples() if isinstance(of, of_data.Bucketed) else []


def told(of: Any) -> str:
    """Which share of the samples falls into which bucket; nothing where there are none."""
    return of.told() if isinstance(of, of_data.Bucketed) else ""
