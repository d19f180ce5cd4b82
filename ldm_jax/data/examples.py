"""From a record of a source to an example of a batch: the window of its picture, and what belongs to it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ldm_jax.data import degradation, masks, transforms
from ldm_jax.data import layout as layouts

SIZES = "sizes"  # fields that are made here: see `transforms.sizes` ...
SMALL = "small"  # ... `degradation.small` ...
HOLE = "hole"  # ... `masks.hole` ...
LAYOUT = "layout"  # ... and `layout.tokens`
MADE = (SIZES, SMALL, HOLE, LAYOUT)
BOXES, SEGMENTATION = "boxes", "segmentation"  # what records have
# (record, fields, rng) -> `x`, these fields and a caption, if there is one; picklable, for workers
Show = Callable[[dict[str, Any], Sequence[str], np.random.Generator], dict[str, Any]]


@dataclass(frozen=True)
class Making:
    """How the fields are made that records do not have.

    Raises:
      ValueError: an unknown kind of masks or of degradation.
    """

    shrink: int = 1  # how much smaller "small" is ...
    degradation: str = "bicubic"  # ... and how it got so: a name of `degradation.KINDS`
    holes: tuple[str, ...] = ("boxes",)  # names of `masks.KINDS`
    layout: layouts.Layout | None = None

    def __post_init__(self) -> None:
        masks.check(self.holes)
        degradation.check(self.degradation)


def picture(
    record: dict[str, Any],
    fields: Sequence[str],
    rng: np.random.Generator,
    *,
    size: tuple[int, int],
    crop: str,
    flip: bool,
    making: Making,
) -> dict[str, Any]:
    """An example of a record with a picture: a window of it in [-1, 1], and its fields."""
    image, original = transforms.decode_sized(record["image"], at_least=size)
    view = transforms.window(image.size, size, crop=crop, flip=flip, rng=rng)
    example = seen(record, fields, image, original, view, size)
    if SMALL in fields:
        pixels = transforms.show(image, view, size)
        example[SMALL] = degradation.small(making.degradation, pixels, making.shrink, rng)
    if HOLE in fields:
        example[HOLE] = masks.hole(making.holes, size, rng)
    if LAYOUT in fields:
        example[LAYOUT] = layouts.tokens(making.layout, record[BOXES], view, rng)
    return example | one_caption(record, rng)


def seen(
    record: dict[str, Any],
    fields: Sequence[str],
    image: Any,
    original: tuple[int, int],
    view: transforms.Window,
    size: tuple[int, int],
) -> dict[str, Any]:
    """`x` and the stored fields of a record whose picture, decoded to `image`, is seen through a window."""
    example = {name: record[name] for name in fields if name not in MADE}
    example["x"] = transforms.to_unit(transforms.show(image, view, size))
    if SIZES in fields:
        example[SIZES] = transforms.sizes(original, view, size)
    if SEGMENTATION in fields:
        labels = transforms.decode_labels(record[SEGMENTATION])
        example[SEGMENTATION] = transforms.show_labels(labels, view, size)[..., None]
    return example


def one_caption(record: dict[str, Any], rng: np.random.Generator) -> dict[str, str]:
    """`caption`: the record's, or one of several at random; nothing where there is none."""
    if "caption" not in record:
        return {}
    captions = captions_of(record)
    return {"caption": captions[choice(captions, rng)]}


def captions_of(record: dict[str, Any]) -> list[str]:
    caption = record["caption"]
    return [caption] if isinstance(caption, str) else list(caption)


def choice(captions: Sequence[str], rng: np.random.Generator) -> int:
    """The number of one of them; nothing is drawn where there is one."""
    return int(rng.integers(len(captions))) if len(captions) > 1 else 0
