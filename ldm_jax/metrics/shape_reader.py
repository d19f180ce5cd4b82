"""An independent reader of `shapes` pictures: rules on pixels, nothing trained, nothing of the code that draws.

A pixel is a mixture of one palette colour and grey, rgb = a * colour + (1 - a) * grey, so that its chroma
(rgb minus its mean) points along the colour's chroma whatever the grey is, and its length tells a. Pixels
with a > 1/2 of one hue that hang together and have a core are an object. Its shape is the template, stretched
to a box, with the largest

    sum min(a, t) / sum max(a, t)

over the pixels that belong to no other object, so that what is hidden does not count. The sides of the box
are searched around the visible ones, and further out where another object touches.

A picture agrees with a caption when its objects can be matched one to one with the claimed ones in colour,
shape, place and relation; sizes and backgrounds are not judged. "On the left" says nothing about height; in a
narrow belt between left and right neither is true.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageDraw
from scipy import ndimage

from ldm_jax.data.shapes.vocabulary import COLOURS, SHAPES
from ldm_jax.metrics.caption_reader import Claim, Claims, parse

LEAST_AREA = 0.01  # of the picture: smaller patches are specks
LEAST_OVERLAP = 0.6  # of the best template: what fits worse has no shape
LEAST_ASPECT = 0.85  # shorter by longer side of a box: flatter ones count in proportion less
LEAST_SEEN = 0.85  # of a template: boxes that hide more under others count in proportion less
HOPELESS = 0.25  # overlap that a search for a better box does not make good
EDGE = 0.06  # the half width of the belt between left and right, top and bottom
MIDDLE = 0.15  # how far from the centre of the picture "in the middle" reaches
APART = 0.08  # the least distance along its axis for a relation


class Found(NamedTuple):
    """An object in a picture. Lengths are parts of the picture's sides, y downwards."""

    shape: str | None  # None: nothing that we know
    colour: str
    centre: tuple[float, float]  # y, x of the middle of the box
    area: float  # of what is seen, as a part of the picture
    box: tuple[float, float, float, float]  # ymin, xmin, ymax, xmax, with what is hidden


GRAIN = 240  # samples along each side of a template
PALETTE = np.array(list(COLOURS.values()), np.float64)
CHROMA = PALETTE - PALETTE.mean(1, keepdims=True)


@functools.cache
def summed(shape: str) -> Float[np.ndarray, "n n"]:
    """The summed-area table of a shape that fills the unit square: any box's share of it by four look-ups."""
    n = GRAIN * 4
    canvas = Image.new("1", (n, n))
    pen = ImageDraw.Draw(canvas)
    third, two_thirds = 0.32 * n, 0.68 * n
    turns, reach = np.arange(10) * np.pi / 5, np.where(np.arange(10) % 2, 0.45, 1.0)
    star = np.stack([reach * np.sin(turns), -reach * np.cos(turns)], 1)
    star = n * (star - star.min(0)) / np.ptp(star, axis=0)
    if shape == "circle":
        pen.ellipse((0, 0, n - 1, n - 1), fill=1)
    elif shape == "square":
        pen.rectangle((0, 0, n, n), fill=1)
    elif shape == "cross":
        pen.rectangle((third, 0, two_thirds, n), fill=1)
        pen.rectangle((0, third, n, two_thirds), fill=1)
    else:
        corners = {
            "triangle": [(n / 2, 0), (n, n), (0, n)],
            "diamond": [(n / 2, 0), (n, n / 2), (n / 2, n), (0, n / 2)],
            "star": [tuple(corner) for corner in star],
        }
        pen.polygon(corners[shape], fill=1)
    mask = np.asarray(canvas, np.float64).reshape(GRAIN, 4, GRAIN, 4).mean((1, 3))
    return np.pad(mask.cumsum(0).cumsum(1), ((1, 0), (1, 0))) / GRAIN**2


def template(
    shape: str, boxes: Float[np.ndarray, "n 4"], size: tuple[int, int]
) -> Float[np.ndarray, "n h w"]:
    """How much of each pixel the shape covers when it fills a box (in pixels: ymin, xmin, ymax, xmax)."""

    def index(edges, low, high):
        part = (np.arange(edges + 1) - low[:, None]) / (high - low)[:, None]
        return np.rint(np.clip(part, 0, 1) * GRAIN).astype(int)

    rows, columns = (
        index(size[0], boxes[:, 0], boxes[:, 2]),
        index(size[1], boxes[:, 1], boxes[:, 3]),
    )
    table = summed(shape)[rows[:, :, None], columns[:, None, :]]
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return np.diff(np.diff(table, axis=1), axis=2) * area[:, None, None]


def read(image: UInt8[np.ndarray, "h w 3"], shapes: Sequence[str] = SHAPES) -> list[Found]:
    """The objects in a picture, in no particular order; `shapes` are those that may be there."""
    size = image.shape[:2]
    chroma = image.astype(np.float64) - image.mean(-1, keepdims=True)
    along = chroma @ (CHROMA / np.linalg.norm(CHROMA, axis=1, keepdims=True)).T
    nearest = along.argmax(-1)
    share = along / np.linalg.norm(CHROMA, axis=1)  # the part a of each palette colour
    solid = share.max(-1) > 0.5
    owner = np.zeros(size, int)
    colours = []
    for k in range(len(PALETTE)):
        patches, count = ndimage.label(solid & (nearest == k), np.ones((3, 3)))
        cores = ndimage.binary_erosion(patches > 0)
        for i in range(1, count + 1):
            patch = patches == i
            if patch.sum() >= LEAST_AREA * patch.size and (patch & cores).any():
                colours.append(k)
                owner[patch] = len(colours)
    if not colours:
        return []
    # Rims between two colours have a third hue, but no core: give them to the object beside them.
    far, (ys, xs) = ndimage.distance_transform_edt(owner == 0, return_indices=True)
    owner = np.where((far < 2.5) & (solid | (owner > 0)), owner[ys, xs], 0)
    return [
        recognise(owner, i + 1, share[..., k], list(COLOURS)[k], shapes)
        for i, k in enumerate(colours)
    ]


def recognise(
    owner: np.ndarray,
    number: int,
    share: Float[np.ndarray, "h w"],
    colour: str,
    shapes: Sequence[str],
) -> Found:
    """The object of that number in a map of owners: its shape and its box by matching templates."""
    h, w = owner.shape
    mine, others = owner == number, (owner > 0) & (owner != number)
    near = ndimage.binary_dilation(mine, np.ones((3, 3))) & ~others
    full = max(float(np.median(share[mine])), 0.5)  # colours may be paler than the palette
    # Blur flattens edges and makes every shape rounder: make them steeper again.
    a = np.where(near & ~others, np.clip(1.5 * (share / full - 0.5) + 0.5, 0, 1), 0)
    rows, columns = np.flatnonzero(mine.any(1)), np.flatnonzero(mine.any(0))
    box = np.array([rows[0], columns[0], rows[-1] + 1, columns[-1] + 1], float)
    touched = sides_touched(mine, others, box)
    top, left = (max(int(v - 0.5 * max(box[2:] - box[:2])) - 2, 0) for v in box[:2])
    bottom, right = (int(v + 0.5 * max(box[2:] - box[:2])) + 3 for v in box[2:])
    window, corner = np.s_[top:bottom, left:right], np.array([top, left, top, left])
    a, counts, box = a[window], ~others[window], box - corner
    first = {s: float(overlaps(s, box[None], a, counts)[0]) for s in shapes}
    likely = [s for s in shapes if first[s] > max(first.values()) - HOPELESS]
    fits = {s: fit(s, box, a, counts, touched) for s in likely}
    shape = max(fits, key=lambda s: fits[s][0])
    overlap, box = fits[shape]
    ymin, xmin, ymax, xmax = (float(v) for v in (box + corner) / (h, w, h, w))
    return Found(
        shape=shape if overlap >= LEAST_OVERLAP else None,
        colour=colour,
        centre=((ymin + ymax) / 2, (xmin + xmax) / 2),
        area=float(mine.mean()),
        box=(ymin, xmin, ymax, xmax),
    )


def sides_touched(
    mine: Bool[np.ndarray, "h w"], others: Bool[np.ndarray, "h w"], box: Float[np.ndarray, "4"]
) -> list[bool]:
    """For each side of the box, whether another object touches what is seen there and may hide some of it."""
    contact = mine & ndimage.binary_dilation(others, np.ones((3, 3)), iterations=2)
    ys, xs = np.nonzero(contact)
    if not len(ys):
        return [False] * 4
    margin = 0.35 * (box[2:] - box[:2])
    return [
        bool(ys.min() < box[0] + margin[0]),
        bool(xs.min() < box[1] + margin[1]),
        bool(ys.max() + 1 > box[2] - margin[0]),
        bool(xs.max() + 1 > box[3] - margin[1]),
    ]


def overlaps(
    shape: str,
    boxes: Float[np.ndarray, "n 4"],
    a: Float[np.ndarray, "h w"],
    counts: Bool[np.ndarray, "h w"],
) -> Float[np.ndarray, " n"]:
    """How well a shape in each of the boxes covers `a` where it `counts`, less for unlikely boxes; in [0, 1]."""
    whole = template(shape, boxes, a.shape)
    t = whole * counts
    overlap = np.minimum(a, t).sum((1, 2)) / np.maximum(a, t).sum((1, 2))
    height, width = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    aspect = np.minimum(height, width) / np.maximum(height, width)
    seen = t.sum((1, 2)) / whole.sum((1, 2))
    return overlap * np.minimum(aspect / LEAST_ASPECT, 1) * np.minimum(seen / LEAST_SEEN, 1)


def fit(
    shape: str,
    box: Float[np.ndarray, "4"],
    a: Float[np.ndarray, "h w"],
    counts: Bool[np.ndarray, "h w"],
    touched: Sequence[bool],
) -> tuple[float, Float[np.ndarray, "4"]]:
    """The best overlap of a shape's template with `a`, and its box: one side after the other, twice."""
    best = 0.0
    for _, side in itertools.product(range(2), range(4)):
        out = -1.0 if side < 2 else 1.0
        steps = [0.0, -0.5, 0.5, -1.0, 1.0]
        if touched[side]:
            reach = 0.35 * (box[2 + side % 2] - box[side % 2])
            steps += list(np.arange(1.5, max(reach, 1.5) + 0.25, 0.5))
        boxes = np.repeat(box[None], len(steps), 0)
        boxes[:, side] += out * np.array(steps)
        boxes = boxes[(boxes[:, 2:] - boxes[:, :2]).min(1) >= 2]
        overlap = overlaps(shape, boxes, a, counts)
        best, box = float(overlap.max()), boxes[overlap.argmax()]
    return best, box


def stands(centre: tuple[float, float], place: str) -> bool:
    """Whether a point (y, x) of the picture is at a place."""
    y, x = centre[0] - 0.5, centre[1] - 0.5
    return {
        "left": x < -EDGE,
        "right": x > EDGE,
        "top": y < -EDGE,
        "bottom": y > EDGE,
        "middle": max(abs(y), abs(x)) < MIDDLE,
    }[place]


def related(a: tuple[float, float], b: tuple[float, float], relation: str) -> bool:
    """Whether `a` lies so as seen from `b`; the longer of the two distances decides which axis."""
    dy, dx = a[0] - b[0], a[1] - b[1]
    across, down = abs(dx) > max(APART, abs(dy)), abs(dy) > max(APART, abs(dx))
    return {
        "left": across and dx < 0,
        "right": across and dx > 0,
        "above": down and dy < 0,
        "below": down and dy > 0,
        "beside": across,
    }[relation]


def matches(found: Sequence[Found], claims: Claims) -> bool:
    """Whether the claimed objects are there, all and only, and stand as claimed."""
    if len(found) != len(claims.objects):
        return False
    return any(
        all(
            (f.colour, f.shape) == (c.colour, c.shape) and all(stands(f.centre, p) for p in c.place)
            for f, c in zip(order, claims.objects, strict=True)
        )
        and all(related(order[i].centre, order[j].centre, r) for i, r, j in claims.relations)
        for order in itertools.permutations(found)
    )


def agrees(image: UInt8[np.ndarray, "h w 3"], caption: str, shapes: Sequence[str] = SHAPES) -> bool:
    """Whether a picture shows what the caption says; sizes and backgrounds are not judged."""
    return matches(read(image, shapes), parse(caption))


def contains(image: UInt8[np.ndarray, "h w 3"], claimed: Claim, shapes: Sequence[str]) -> bool:
    """Whether an object of the claimed colour and shape is in a picture, whatever else there is."""
    wanted = (claimed.colour, claimed.shape)
    return any((found.colour, found.shape) == wanted for found in read(image, shapes))


def named(captions: Sequence[str]) -> tuple[str, ...]:
    """The shapes that captions name: those of a data set, if they are enough of its captions."""
    said = {claim.shape for caption in captions for claim in parse(caption).objects}
    return tuple(shape for shape in SHAPES if shape in said)


def accuracy(
    images: UInt8[np.ndarray, "n h w 3"], captions: Sequence[str], shapes: Sequence[str] = SHAPES
) -> float:
    """The fraction of the pictures that agree with their captions, in [0, 1].

    Raises:
      ValueError: not one caption for each picture, no picture, or a caption without an object.
    """
    if len(images) != len(captions) or not len(captions):
        raise ValueError(
            f"{len(images)} pictures, {len(captions)} captions: give one for each, at least one"
        )
    pairs = zip(images, captions, strict=True)
    return sum(agrees(*pair, shapes) for pair in pairs) / len(captions)
