"""Boxes of named things as a row of token numbers: what layout-to-image models read.

Each object is three tokens: its class, and the upper left and the lower right corner of its box. A corner is the number
of the nearest point of a grid of S x S points over the picture, row by row, with S = floor(sqrt(vocab)). Objects that
are not there are three times the last token. Two more tokens may say which part of the picture is shown, as the corners
of that window; boxes are then those of the whole picture, and otherwise those of the window. This is the coordinates'
tokenization of CompVis (`ObjectsBoundingBoxConditionalBuilder` of taming-transformers; 30 objects and a window are the
92 tokens of Rombach et al. 2022, section 4.3.1).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from ldm_jax.data.transforms import BadImage, Window

BOX = "bbox"  # of a record's boxes: [n 4], ymin, xmin, ymax, xmax as parts of the picture's sides
SLACK = 0.01  # of a side: so far may a box reach out of its picture, by rounding

Box = Float[np.ndarray, "4"]


@dataclass(frozen=True)
class Layout:
    """How boxes become tokens.

    `classes` are the entries of a record's boxes that tell what a thing is, and how many values each has. The class of
    (("group", 2), ("label", 600)) is 600 group + label.

    Raises:
      ValueError: no class, no object, or a vocabulary with no room for them.
    """

    classes: tuple[tuple[str, int], ...]
    objects: int = 30
    vocab: int = 8192
    window: bool = True

    def __post_init__(self) -> None:
        kinds = math.prod(count for _, count in self.classes)
        if not self.classes or self.objects < 1 or kinds >= self.vocab:
            raise ValueError(
                f"a layout of {self.objects} objects of {kinds} classes has no room in a vocabulary of {self.vocab}, "
                "whose last token means that there is none; give classes, objects from 1 on, and a larger vocab"
            )
        if self.sections < 2 or self.sections**2 == self.vocab:
            raise ValueError(
                f"vocab={self.vocab}: the last point of the grid of {self.sections} x {self.sections} would be the "
                f"token for no object; give {self.vocab + 1}"
            )

    @property
    def none(self) -> int:
        return self.vocab - 1

    @property
    def sections(self) -> int:
        return math.isqrt(self.vocab)

    @property
    def length(self) -> int:
        return 3 * self.objects + 2 * self.window


def tokens(
    of: Layout, boxes: Mapping[str, Any], view: Window, rng: np.random.Generator
) -> Int[np.ndarray, " n"]:
    """The row of a picture that is seen through a window; the objects that are seen there stand in random order.

    `boxes` has `BOX` and the entries of `of.classes`, a value an object. Of more objects than there is room for, the
    first ones are taken.

    Raises:
      BadImage: a box outside of the picture.
      ValueError: a class out of range, or an entry that the boxes lack.
    """
    kinds = numbers(of, boxes)[: of.objects]
    corners = inside(boxes[BOX])[: of.objects]
    (width, height), (left, top, right, bottom) = view.source, view.box
    window = np.array([top / height, left / width, bottom / height, right / width])
    order = rng.permutation(len(kinds))
    row = []
    for kind, box in zip(kinds[order], corners[order], strict=True):
        seen = np.minimum(box[2:], window[2:]) - np.maximum(box[:2], window[:2])
        if seen.min() <= 0:
            continue
        if not of.window:
            side = np.tile(window[2:] - window[:2], 2)
            box = np.clip((box - np.tile(window[:2], 2)) / side, 0, 1)
        row += [int(kind), *corner_tokens(of, mirrored(box) if view.flip else box)]
    row += [of.none] * (3 * of.objects - len(row))
    if of.window:
        row += corner_tokens(of, mirrored(window) if view.flip else window)
    return np.array(row, np.int32)


def objects(of: Layout, row: Sequence[int]) -> list[tuple[int, tuple[float, float, float, float]]]:
    """The classes and boxes (ymin, xmin, ymax, xmax) of a row of tokens, on the grid's points."""
    found = []
    for kind, low, high in np.asarray(row[: 3 * of.objects]).reshape(-1, 3).tolist():
        if kind != of.none:
            corners = [
                part / (of.sections - 1) for c in (low, high) for part in divmod(c, of.sections)
            ]
            found.append((kind, tuple(corners)))
    return found


def corner_tokens(of: Layout, box: Box) -> list[int]:
    """The points of the grid that are nearest to the upper left and the lower right corner."""
    ymin, xmin, ymax, xmax = np.rint(box * (of.sections - 1)).astype(int).tolist()
    return [ymin * of.sections + xmin, ymax * of.sections + xmax]


def mirrored(box: Box) -> Box:
    ymin, xmin, ymax, xmax = box
    return np.array([ymin, 1 - xmax, ymax, 1 - xmin])


def inside(boxes: Any) -> Float[np.ndarray, "n 4"]:
    """Boxes within [0, 1], after a look whether they are.

    Raises:
      BadImage: a box outside of the picture, or without an area.
    """
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    out = (boxes < -SLACK) | (boxes > 1 + SLACK) | (boxes[:, [0, 1, 0, 1]] > boxes[:, [2, 3, 2, 3]])
    if out.any():
        wrong = [round(float(v), 4) for v in boxes[out.any(1)][0]]
        raise BadImage(
            f"the box {wrong} (ymin, xmin, ymax, xmax) lies outside of its picture, whose sides are from 0 to 1, "
            "or is upside down; correct it"
        )
    return boxes.clip(0, 1)


def numbers(of: Layout, boxes: Mapping[str, Any]) -> Int[np.ndarray, " n"]:
    """The class of each box.

    Raises:
      ValueError: an entry that the boxes lack, or a class out of range.
    """
    found = np.zeros(len(boxes[BOX]), np.int64)
    for name, count in of.classes:
        if name not in boxes:
            raise ValueError(f"the boxes have no {name!r} but {sorted(boxes)}; see data.layout")
        values = np.asarray(boxes[name], np.int64)
        if len(values) and not 0 <= values.min() <= values.max() < count:
            wrong = values[(values < 0) | (values >= count)][0]
            raise ValueError(
                f"a box has the {name} {wrong}, and data.layout has {count} of them (0 to {count - 1}); "
                "give as many as there are"
            )
        found = found * count + values
    return found
