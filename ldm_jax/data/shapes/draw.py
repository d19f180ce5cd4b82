"""Painting a scene: analytic anti-aliasing by signed distances.

With d the signed distance in pixels from a pixel's centre to an outline (negative inside), the part
of the pixel that is covered is about clip(1/2 - d, 0, 1), exact for straight edges along the axes.
Objects are laid over the background in their order: c <- c (1 - coverage) + colour * coverage.

Coordinates are pixels, (y, x), y downwards, the first pixel's centre at (0.5, 0.5). An object's
centre is the centre of its bounding box.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from ldm_jax.data.shapes import vocabulary


class Thing(NamedTuple):
    """One object: words, and where it is in pixels."""

    shape: str
    colour: str
    size: str
    y: float
    x: float
    radius: float


class Backdrop(NamedTuple):
    """A grey background: its mean level and how far it swings, in grey levels of 0-255."""

    kind: str
    level: float
    contrast: float
    period: float  # of stripes and squares, pixels
    angle: float  # of stripes and shading, radians
    seed: int  # of grain


class Scene(NamedTuple):
    """A picture before it is painted; later things lie over earlier ones."""

    side: int
    backdrop: Backdrop
    things: tuple[Thing, ...]


@functools.cache
def pixel_centres(side: int) -> tuple[Float[np.ndarray, "h 1"], Float[np.ndarray, "1 w"]]:
    axis = np.arange(side, dtype=np.float32) + 0.5
    return axis[:, None], axis[None, :]


# The half height and half width of each shape, for radius 1. Areas are balanced by eye: a square
# as wide as a circle looks larger.
HALF = {
    "circle": (1.0, 1.0),
    "square": (0.92, 0.92),
    "triangle": (0.93, 1.07),
    "star": (1.085, 1.141),
    "cross": (1.0, 1.0),
    "diamond": (1.15, 1.15),
}
STAR_TIP, STAR_NOTCH = 1.2, 0.54  # radii of the star's outer and inner corners, for radius 1
ARM = 0.36  # half the width of the cross's arms, for radius 1


def extent(thing: Thing) -> tuple[float, float, float, float]:
    """The box of the whole object, also of what is hidden: ymin, xmin, ymax, xmax in pixels."""
    h, w = (thing.radius * half for half in HALF[thing.shape])
    return thing.y - h, thing.x - w, thing.y + h, thing.x + w


def distance(thing: Thing, side: int) -> Float[np.ndarray, "h w"]:
    """The signed distance to the outline in pixels, negative inside (beyond corners a bound)."""
    ys, xs = pixel_centres(side)
    r = thing.radius
    y, x = ys - np.float32(thing.y), np.abs(xs - np.float32(thing.x))  # left mirrors right
    if thing.shape not in HALF:
        raise ValueError(f"no shape {thing.shape!r}; choose one of {vocabulary.SHAPES}")
    h, w = (r * half for half in HALF[thing.shape])
    if thing.shape == "circle":
        return np.sqrt(y * y + x * x) - r
    if thing.shape == "square":
        return np.maximum(np.abs(y) - h, x - w)
    if thing.shape == "triangle":  # the side runs from the tip (-h, 0) to the corner (h, w)
        return np.maximum(y - h, (2 * h * x - w * (y + h)) / np.hypot(2 * h, w))
    if thing.shape == "diamond":
        return (np.abs(y) + x - h) / np.sqrt(2)
    if thing.shape == "cross":
        y = np.abs(y)
        return np.minimum(
            np.maximum(y - r, x - ARM * r),
            np.maximum(y - ARM * r, x - r),
        )
    return star_distance(y, x, r)


def star_distance(y: np.ndarray, x: np.ndarray, r: float) -> Float[np.ndarray, "h w"]:
    """A five-pointed star: by symmetry one edge, from a tip to the next notch, tells all."""
    y = y - r * (STAR_TIP - HALF["star"][0])  # from the centre of the box to the centre of the star
    sector = np.pi / 5
    angle = np.arctan2(x, -y)  # 0 at the upper tip
    angle = np.abs((angle + sector) % (2 * sector) - sector)
    rho = np.hypot(y, x)
    along, across = rho * np.cos(angle), rho * np.sin(angle)
    tip, notch = r * STAR_TIP, r * STAR_NOTCH
    dy, dx = notch * np.sin(sector), notch * np.cos(sector) - tip
    return ((along - tip) * dy - across * dx) / np.hypot(dy, dx)


def coverage(thing: Thing, side: int) -> Float[np.ndarray, "h w"]:
    """The part of each pixel that the object covers, in [0, 1]."""
    return np.clip(0.5 - distance(thing, side), 0, 1)


def background(b: Backdrop, side: int) -> Float[np.ndarray, "h w"]:
    """Grey levels in 0-255."""
    ys, xs = pixel_centres(side)
    if b.kind == "plain":
        wave = np.zeros((side, side), np.float32)
    elif b.kind == "striped":
        along = np.sin(b.angle) * ys + np.cos(b.angle) * xs
        wave = np.clip(b.period * np.sin(2 * np.pi / b.period * along) / np.pi, -1, 1)
    elif b.kind == "checkered":
        odd = np.floor(2 * ys / b.period) + np.floor(2 * xs / b.period)
        wave = 2 * (odd % 2) - 1
    elif b.kind == "shaded":
        wave = 2 * (np.sin(b.angle) * (ys - side / 2) + np.cos(b.angle) * (xs - side / 2)) / side
    elif b.kind == "grainy":
        wave = np.random.default_rng(b.seed).uniform(-1, 1, (side, side))
    else:
        raise ValueError(f"no backdrop {b.kind!r}; choose one of {vocabulary.BACKDROPS}")
    return (b.level + b.contrast * wave).astype(np.float32)


def render(
    scene: Scene, shapes: Sequence[str] = vocabulary.SHAPES
) -> tuple[UInt8[np.ndarray, "h w 3"], UInt8[np.ndarray, "h w 1"]]:
    """The picture, and its segmentation: 0 is background, k + 1 the k-th of `shapes`."""
    grey = background(scene.backdrop, scene.side)
    image = np.repeat(grey[..., None], 3, axis=2)
    segmentation = np.zeros(grey.shape, np.uint8)
    for thing in scene.things:
        cover = coverage(thing, scene.side)
        image += cover[..., None] * (np.float32(vocabulary.COLOURS[thing.colour]) - image)
        segmentation[cover >= 0.5] = shapes.index(thing.shape) + 1
    return (image + 0.5).astype(np.uint8), segmentation[..., None]
