"""Boxes of objects (ymin, xmin, ymax, xmax, as parts of the sides): whether two are the same, and how they look."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8

from ldm_jax.metrics import shape_reader
from ldm_jax.metrics.shape_reader import Found

SAME_PLACE = 0.5  # intersection over union of two boxes from which they are the same


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes (ymin, xmin, ymax, xmax)."""
    h, w = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(h, 0) * max(w, 0)
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return both / (areas - both)


def same(a: Found, b: Found) -> bool:
    """Whether two objects have one colour, shape and place."""
    return (a.colour, a.shape) == (b.colour, b.shape) and iou(a.box, b.box) >= SAME_PLACE


def covered(mask: Float[np.ndarray, "h w"], box: Sequence[float]) -> float:
    """The share of a box that is within a mask."""
    h, w = mask.shape
    top, left, bottom, right = (round(v * n) for v, n in zip(box, (h, w, h, w), strict=True))
    return float(mask[top : bottom + 1, left : right + 1].mean())


def outlines(objects: Sequence[Found], size: tuple[int, int]) -> UInt8[np.ndarray, "h w 3"]:
    """The boxes of objects in their colours, on black."""
    picture = np.zeros((*size, 3), np.uint8)
    for of in objects:
        top, left, bottom, right = (
            min(max(round(v * n), 0), n - 1) for v, n in zip(of.box, (*size, *size), strict=True)
        )
        colour = shape_reader.COLOURS[of.colour]
        picture[top : bottom + 1, [left, right]] = colour
        picture[[top, bottom], left : right + 1] = colour
    return picture
