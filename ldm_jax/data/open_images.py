"""OpenImages with its boxes, as it is downloaded (version 6, the layout that taming-transformers reads).

class-descriptions-boxable.csv      /m/011k07,Tortoise: one line a class
oidv6-train-annotations-bbox.csv    ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,...
validation-annotations-bbox.csv, test-annotations-bbox.csv
train/000002b66c9c498e.jpg, validation/..., test/...
"""

import csv
import os
from pathlib import Path

import numpy as np

from ldm_jax.data import boxed
from ldm_jax.data.tables import existing

CLASSES = "class-descriptions-boxable.csv"
TABLES = {
    "train": "oidv6-train-annotations-bbox.csv",
    "validation": "validation-annotations-bbox.csv",
    "test": "test-annotations-bbox.csv",
}
SIDES = ("YMin", "XMin", "YMax", "XMax")


def open_images(
    path: str | os.PathLike,
    *,
    split: str = "train",
    smallest: float = boxed.SMALLEST,
    fewest: int = boxed.FEWEST,
    most: int = boxed.MOST,
) -> boxed.Boxed:
    """Pictures with boxes: "label", in the order of the classes' ids, and "group", 1 for a crowd of such things.

    Raises:
      FileNotFoundError: a table, or a picture that it names, is not there.
      ValueError: a split or a class that there is not, or a box outside of its picture.
    """
    root = Path(path).expanduser()
    if split not in TABLES:
        raise ValueError(f"OpenImages has no split {split!r}; choose one of {tuple(TABLES)}")
    with existing(root / CLASSES).open(encoding="utf-8", newline="") as file:
        names = dict(row[:2] for row in csv.reader(file) if row)
    numbers = {key: number for number, key in enumerate(sorted(names))}
    table, files = existing(root / TABLES[split]), {}
    picture, label, group, sides = [], [], [], []
    with table.open(encoding="utf-8", newline="") as file:
        for line, row in enumerate(csv.DictReader(file), start=2):
            if row["LabelName"] not in numbers:
                raise ValueError(
                    f"line {line} of {table} has the class {row['LabelName']!r}, which {CLASSES} does not name"
                )
            picture.append(files.setdefault(f"{row['ImageID']:0>16}.jpg", len(files)))
            label.append(numbers[row["LabelName"]])
            group.append(row["IsGroupOf"] == "1")
            sides.append([float(row[side]) for side in SIDES])
    return boxed.boxed(
        f"open_images ({split})",
        existing(root / split),
        [names[key] for key in sorted(names)],
        list(files),
        np.array(picture, np.int32),
        np.array(sides, np.float32).reshape(-1, 4),
        {"label": np.array(label, np.int16), "group": np.array(group, np.int8)},
        smallest=smallest,
        fewest=fewest,
        most=most,
    )
