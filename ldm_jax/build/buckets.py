"""The section `data.buckets`: which sizes pictures are trained in, and which picture in which."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from beartype.door import is_bearable
from jaxtyping import Int
from ml_collections import ConfigDict

from ldm_jax.build import parts
from ldm_jax.build.sections import checked
from ldm_jax.data import buckets as of_data
from ldm_jax.data import latents

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

    Raises:
      ValueError: as `placed`; a bucket without a batch of pictures; or a cache in buckets, and the config has none.
    """
    if not sizes(config):
        if isinstance(of, latents.Cached) and of.plan.buckets:
            raise ValueError(
                f"the {of.name} are in buckets, and data.buckets is not set; set it as it was for this cache"
            )
        return parts.batches(config, of, fields, **more)
    wanted, members = placed(config, of)
    options = parts.reading(config, of, fields, **more)
    options.pop("size")
    return of_data.bucketed(of, buckets=wanted, members=members, **options)


def placed(config: ConfigDict, of: Any) -> tuple[tuple[of_data.Size, ...], Int[np.ndarray, " n"]]:
    """The buckets of a source, pictures or a cache of them, and in which of them each record is.

    Of a budget, the buckets that have no batch of pictures are left out.

    Raises:
      ValueError: a source that does not know the sizes of its pictures, or a cache of other buckets.
    """
    wanted, budget = sizes(config), isinstance(parts.data(config)["buckets"], dict)
    if isinstance(of, latents.Cached):
        held = tuple((h, w) for h, w, _ in of.plan.buckets)
        if not held or not (set(held) <= set(wanted) if budget else held == wanted):
            raise ValueError(
                f"the {of.name} are of the buckets {list(held)} (height, width), and data.buckets says {list(wanted)}; "
                "write another cache, or set data.buckets as it was for this one"
            )
        return held, np.repeat(np.arange(len(held)), [n for *_, n in of.plan.buckets])
    if not isinstance(of, of_data.Sized):
        raise ValueError(
            f"data.buckets needs the sizes of the pictures, which {of.name} does not know; give a folder of pictures, "
            "or leave data.buckets out"
        )
    given = of.sizes()
    if budget:
        wanted = of_data.occupied(given, wanted, parts.data(config)["batch"])
    return wanted, of_data.nearest(given, wanted)


def shapes(of: Any) -> list[dict[str, np.ndarray]]:
    """A row of a batch of each bucket; none where there are no buckets."""
    return of.examples() if isinstance(of, of_data.Bucketed) else []


def told(of: Any) -> str:
    """Which share of the samples falls into which bucket; nothing where there are none."""
    return of.told() if isinstance(of, of_data.Bucketed) else ""
