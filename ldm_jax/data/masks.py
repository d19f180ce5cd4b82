"""Which part of a picture is to be made anew: masks at random, 1 in the hole and 0 around it.

Strokes are those of LaMa (Suvorov et al. 2022, appendix; `configs/data_gen/random_*_256.yaml` of advimman/lama):
polygonal lines of up to five pieces, with a round brush of one width a piece. Their lengths are in 256ths of the
shorter side.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

Mask = Float[np.ndarray, "h w 1"]
Size = tuple[int, int]


class Strokes(NamedTuple):
    """How many lines there are, and how long and wide their pieces are at most."""

    lines: tuple[int, int]  # at least, at most
    length: int
    width: int


STROKES = {
    "thick": Strokes((1, 5), 200, 100),
    "medium": Strokes((4, 5), 100, 50),
    "thin": Strokes((4, 50), 40, 10),
}
PIECES, TURNS = 5, 4  # of a line, at most; a piece points 0, 1, 2 or 3 radians to one side
SHORTEST, NARROWEST = 10, 5  # of a piece
LEAST_RADIUS = 0.75  # pixels: no brush slips through between the pixels' centres
MARGIN = (0.04, 0.25)  # of a side, for outpainting


def hole(kinds: Sequence[str], size: Size, rng: np.random.Generator) -> Mask:
    """A mask of one of the kinds, each as likely; a kind that is named twice is drawn twice as often.

    Raises:
      ValueError: see `check`.
    """
    check(kinds)
    kind = kinds[int(rng.integers(len(kinds)))] if len(kinds) > 1 else kinds[0]
    return KINDS[kind](size, rng)


def check(kinds: Sequence[str]) -> None:
    """Raises: ValueError: no kind, or an unknown one."""
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise ValueError(f"there are no masks of {unknown or 'no kind'}; choose of {tuple(KINDS)}")


def boxes(size: Size, rng: np.random.Generator) -> Mask:
    """One to three boxes, each of a tenth to two thirds of either side."""
    mask = np.zeros((*size, 1), np.float32)
    for _ in range(rng.integers(1, 4)):
        h, w = (max(int(n * rng.uniform(0.1, 0.67)), 1) for n in size)
        top, left = (int(rng.integers(0, n - m + 1)) for n, m in zip(size, (h, w), strict=True))
        mask[top : top + h, left : left + w] = 1
    return mask


def strokes(of: Strokes, size: Size, rng: np.random.Generator) -> Mask:
    """Lines with a brush, from anywhere; every second one turns to the other side."""
    mask, unit = np.zeros(size, np.float32), min(size) / 256
    for i in range(rng.integers(of.lines[0], of.lines[1] + 1)):
        start = rng.uniform(0, size)
        for _ in range(1 + rng.integers(PIECES)):
            angle = (1 if i % 2 else -1) * (0.01 + rng.integers(TURNS))
            length = unit * (SHORTEST + rng.integers(of.length))
            width = unit * (NARROWEST + rng.integers(of.width))
            end = np.clip(start + length * np.array([np.cos(angle), np.sin(angle)]), 0, size)
            paint(mask, start, end, max(width / 2, LEAST_RADIUS))
            start = end
    return mask[..., None]


def paint(
    mask: Float[np.ndarray, "h w"],
    start: Float[np.ndarray, "2"],
    end: Float[np.ndarray, "2"],
    radius: float,
) -> None:
    """Sets to 1 the pixels whose centres are within `radius` of the segment from `start` to `end`, (y, x) in pixels."""
    low = np.maximum(np.minimum(start, end) - radius, 0).astype(int)
    high = np.minimum(np.ceil(np.maximum(start, end) + radius), mask.shape).astype(int)
    ys, xs = (np.arange(a, b) + 0.5 for a, b in zip(low, high, strict=True))
    (dy, dx), (y, x) = end - start, np.meshgrid(ys - start[0], xs - start[1], indexing="ij")
    along = np.clip((y * dy + x * dx) / max(dy * dy + dx * dx, 1e-9), 0, 1)
    near = (y - along * dy) ** 2 + (x - along * dx) ** 2 <= radius**2
    mask[low[0] : high[0], low[1] : high[1]][near] = 1


def outpaint(size: Size, rng: np.random.Generator) -> Mask:
    """Margins along the sides, each there or not, but at least one; of `MARGIN` of the picture."""
    (h, w), mask = size, np.zeros((*size, 1), np.float32)
    there = rng.random(4) < 0.5
    there[rng.integers(4)] |= not there.any()
    parts = rng.uniform(*MARGIN, 4)
    top, bottom = (max(round(part * h), 1) for part in parts[:2])
    left, right = (max(round(part * w), 1) for part in parts[2:])
    edges = (np.s_[:top], np.s_[h - bottom :], np.s_[:, :left], np.s_[:, w - right :])
    for edge, wanted in zip(edges, there, strict=True):
        if wanted:
            mask[edge] = 1
    return mask


def thick(size: Size, rng: np.random.Generator) -> Mask:
    return strokes(STROKES["thick"], size, rng)


def medium(size: Size, rng: np.random.Generator) -> Mask:
    return strokes(STROKES["medium"], size, rng)


def thin(size: Size, rng: np.random.Generator) -> Mask:
    return strokes(STROKES["thin"], size, rng)


KINDS = {"thick": thick, "medium": medium, "thin": thin, "boxes": boxes, "outpaint": outpaint}
