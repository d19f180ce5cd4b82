"""What an edit of a `shapes` picture changed and what it kept, read by the rules of `shape_reader`."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from ldm_jax.metrics import shape_reader
from ldm_jax.metrics.caption_reader import Claim, parse
from ldm_jax.metrics.shape_reader import Found

Pair = tuple[str, str]  # colour, shape
NEAR = 0.1  # of the picture's sides: an object whose middle moved by less stayed where it was


class Swap(NamedTuple):
    """A caption with one object changed, and which were there before."""

    caption: str
    old: Pair
    new: Pair
    kept: tuple[Pair, ...]


def pairs(captions: Sequence[str]) -> list[Pair]:
    """The combinations of colour and shape that captions name, sorted."""
    return sorted({_pair(claim) for caption in captions for claim in parse(caption).objects})


def swap(caption: str, known: Collection[Pair], number: int) -> Swap | None:
    """The caption with its first object in another colour (even numbers) or shape (odd ones), among `known` pairs.

    None where the object is there twice or no other pair is known.
    """
    first, *others = (_pair(claim) for claim in parse(caption).objects)
    same = number % 2  # of colour and shape what stays
    choices = [
        p for p in sorted(known) if p[1 - same] == first[1 - same] and p[same] != first[same]
    ]
    choices = [p for p in choices if p not in others and p[0] not in {c for c, _ in others}]
    if first in others or not choices:
        return None
    new = choices[number % len(choices)]
    return Swap(
        caption.lower().replace(" ".join(first), " ".join(new), 1), first, new, tuple(others)
    )


def stays(before: Sequence[Found], after: Sequence[Found], pair: Pair) -> bool:
    """Whether the object is in both pictures, at the same place."""
    return any(
        a.shape == b.shape == pair[1]
        and a.colour == b.colour == pair[0]
        and np.hypot(a.centre[0] - b.centre[0], a.centre[1] - b.centre[1]) < NEAR
        for a in before
        for b in after
    )


def hole(
    found: Sequence[Found], pair: Pair, size: tuple[int, int], margin: int
) -> np.ndarray | None:
    """A mask [h w] of the object's box and a margin in pixels; None where there is not just one such object."""
    boxes = [f.box for f in found if (f.colour, f.shape) == pair]
    if len(boxes) != 1:
        return None
    mask = np.zeros(size, np.float32)
    top, left, bottom, right = (round(v * n) for v, n in zip(boxes[0], (*size, *size), strict=True))
    mask[max(top - margin, 0) : bottom + margin, max(left - margin, 0) : right + margin] = 1
    return mask


def inside(
    heat: Float[np.ndarray, "h w"], box: tuple[float, float, float, float]
) -> tuple[float, float]:
    """The share of a map's mass within a box (parts of the sides: ymin, xmin, ymax, xmax), and the box's area."""
    h, w = heat.shape

    def covered(low, high, n):
        edges = np.clip(np.arange(n + 1) / n, low, high)
        return np.diff(edges) * n

    rows, columns = covered(box[0], box[2], h), covered(box[1], box[3], w)
    return float(rows @ heat @ columns / heat.sum()), float(rows.mean() * columns.mean())


def accepted(
    images: UInt8[np.ndarray, "n h w 3"],
    before: UInt8[np.ndarray, "n h w 3"],
    swaps: Sequence[Swap],
    shapes: Sequence[str],
) -> dict[str, float]:
    """How often the new caption is right, and how often the other objects stay where they were, as fractions."""
    right, kept = [], []
    for image, old, made in zip(images, before, swaps, strict=True):
        found, was = shape_reader.read(image, shapes), shape_reader.read(old, shapes)
        right.append(shape_reader.matches(found, parse(made.caption)))
        kept += [stays(was, found, pair) for pair in made.kept]
    return {"right": float(np.mean(right)), "kept": float(np.mean(kept))}


def _pair(claim: Claim) -> Pair:
    return claim.colour, claim.shape
