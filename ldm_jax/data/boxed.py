"""Pictures with boxes of named things: the readers of COCO and OpenImages make it of their tables."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from ldm_jax.data import layout

SMALLEST, FEWEST, MOST = 1e-4, 2, 30  # area of a box, and boxes in a picture: those of CompVis


@dataclass(frozen=True, eq=False)
class Boxed:
    """A `records.Source` whose records have `boxes`: `layout.BOX` and what else is known of each.

    The boxes of all pictures are one array, in the pictures' order: millions of them are quickly copied to workers.
    """

    name: str
    fingerprint: str
    classes: tuple[str, ...]  # names of the boxes' "label"
    root: str
    files: tuple[str, ...] = field(repr=False)  # below the root
    starts: Int[np.ndarray, " m"] = field(repr=False)  # of each picture's boxes, and the end
    columns: Mapping[str, np.ndarray] = field(repr=False)  # of all boxes

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        rows = slice(self.starts[index], self.starts[index + 1])
        boxes = {name: column[rows] for name, column in self.columns.items()}
        return {"image": Path(self.root, self.files[index]).read_bytes(), "boxes": boxes}

    @property
    def kinds(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """Of the boxes' entries those whose values have names, and these."""
        return (("label", self.classes),)

    @property
    def fields(self) -> tuple[str, ...]:
        return ("image", "boxes")

    def only(self, fields: Sequence[str]) -> "Boxed":
        """The same records; their boxes are in memory, so there is nothing to save."""
        return self

    def name_of(self, index: int) -> str:
        return str(Path(self.root, self.files[index]))

    def captions(self) -> Iterator[str]:
        return iter(())


def boxed(
    name: str,
    root: Path,
    classes: Sequence[str],
    files: Sequence[str],
    picture: Int[np.ndarray, " m"],
    bbox: Float[np.ndarray, "m 4"],
    columns: Mapping[str, np.ndarray],
    *,
    smallest: float = SMALLEST,
    fewest: int = FEWEST,
    most: int = MOST,
) -> Boxed:
    """The pictures with `fewest` to `most` boxes of at least an area of `smallest`, in the order of their names.

    Args:
      files: names below the root; `picture` is for each box the number of its file.
      bbox: ymin, xmin, ymax, xmax as parts of the sides.
      columns: what else is known of each box, "label" among it.

    Raises:
      ValueError: a box outside of its picture, no such picture, or a picture that is not there.
    """
    try:
        bbox = layout.inside(bbox).astype(np.float32)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    large = np.prod(bbox[:, 2:] - bbox[:, :2], axis=1) >= smallest
    counts = np.bincount(picture[large], minlength=len(files))
    chosen = np.flatnonzero((counts >= fewest) & (counts <= most))
    if not len(chosen):
        raise ValueError(
            f"{name}: none of the {len(files)} pictures has {fewest} to {most} boxes of an area of {smallest:g}; "
            "change smallest, fewest or most"
        )
    chosen = np.array(sorted(chosen, key=lambda number: files[number]))
    place = np.full(len(files), -1)
    place[chosen] = np.arange(len(chosen))
    rows = np.flatnonzero(large & (place[picture] >= 0))
    rows = rows[np.argsort(place[picture[rows]], kind="stable")]
    kept = {layout.BOX: bbox[rows], **{key: column[rows] for key, column in columns.items()}}
    names = tuple(files[number] for number in chosen)
    there = {file.name for file in root.iterdir()}
    if absent := [file for file in names if file not in there]:
        raise FileNotFoundError(
            f"{len(absent)} of {len(names)} pictures of {name} are not in {str(root)!r}, the first is {absent[0]!r}; "
            "add them, or take their rows out of the tables"
        )
    digest = hashlib.sha256("\n".join((name, *classes, *names)).encode())
    for key in sorted(kept):
        digest.update(key.encode() + np.ascontiguousarray(kept[key]).tobytes())
    return Boxed(
        name=name,
        fingerprint=digest.hexdigest(),
        classes=tuple(classes),
        root=str(root),
        files=names,
        starts=np.concatenate([[0], np.cumsum(counts[chosen])]),
        columns=kept,
    )
