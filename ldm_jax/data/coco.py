"""COCO 2017 as it is downloaded: captions, boxes of things and stuff, and maps of both.

annotations/captions_train2017.json, instances_train2017.json, stuff_train2017.json, and those of val2017
train2017/000000000009.jpg, val2017/...
stuffthingmaps/train2017/000000000009.png, stuffthingmaps/val2017/...: 0 to 181, and 255 is no class
"""

import os
from pathlib import Path
from typing import Any

import numpy as np

from ldm_jax.data import boxed, maps
from ldm_jax.data.beside import Beside
from ldm_jax.data.folder import Folder
from ldm_jax.data.tables import existing, of_rows, read_json

FOLDERS = {"train": "train2017", "validation": "val2017"}
VOID = 255  # of the maps
LEFT_OUT = "other"  # a class of stuff that is everything else


def captions(path: str | os.PathLike, *, split: str = "train") -> Folder:
    """Pictures with their five captions or so, of which training takes one at random.

    Raises:
      FileNotFoundError, ValueError: see `_read`.
    """
    root, folder, table = _read(path, split, "captions")
    names = {image["id"]: image["file_name"] for image in table["images"]}
    rows: dict[str, dict[str, Any]] = {}
    for told in table["annotations"]:
        row = rows.setdefault(names[told["image_id"]], {"caption": []})
        row["caption"].append(told["caption"].strip())
    return of_rows(f"coco captions ({split})", root / folder, rows)


def boxes(
    path: str | os.PathLike,
    *,
    split: str = "train",
    stuff: bool = True,
    smallest: float = boxed.SMALLEST,
    fewest: int = boxed.FEWEST,
    most: int = boxed.MOST,
) -> boxed.Boxed:
    """Pictures with boxes: "label", in the order of the ids, and "group", 1 for a crowd of such things.

    80 classes of things, with `stuff` also 91 of stuff.

    Raises:
      FileNotFoundError, ValueError: see `_read`; a box outside of its picture.
    """
    root, folder, table = _read(path, split, "instances")
    tables = [table, *([_read(path, split, "stuff")[2]] if stuff else [])]
    kinds = {c["id"]: c["name"] for t in tables for c in t["categories"] if c["name"] != LEFT_OUT}
    numbers = {key: number for number, key in enumerate(sorted(kinds))}
    place = {image["id"]: number for number, image in enumerate(table["images"])}
    sides = {image["id"]: (image["width"], image["height"]) for image in table["images"]}
    picture, label, group, found = [], [], [], []
    for told in (one for t in tables for one in t["annotations"]):
        if told["category_id"] not in numbers:
            continue
        (width, height), (x, y, w, h) = sides[told["image_id"]], told["bbox"]
        found.append([y / height, x / width, (y + h) / height, (x + w) / width])
        picture.append(place[told["image_id"]])
        label.append(numbers[told["category_id"]])
        group.append(told.get("iscrowd", 0))
    return boxed.boxed(
        f"coco boxes ({split})",
        root / folder,
        [kinds[key] for key in sorted(kinds)],
        [image["file_name"] for image in table["images"]],
        np.array(picture, np.int32),
        np.array(found, np.float32).reshape(-1, 4),
        {"label": np.array(label, np.int16), "group": np.array(group, np.int8)},
        smallest=smallest,
        fewest=fewest,
        most=most,
    )


def stuff(path: str | os.PathLike, *, split: str = "train") -> Beside:
    """Pictures with maps of 182 classes of things and stuff; where there is none, the map is -1.

    Raises:
      FileNotFoundError: pictures or maps that are not there.
      ValueError: a split that there is not.
    """
    root, folder = _folder(path, split)
    return maps.folder(root / folder, root / "stuffthingmaps" / folder, split="all", void=VOID)


def _folder(path: str | os.PathLike, split: str) -> tuple[Path, str]:
    if split not in FOLDERS:
        raise ValueError(f"COCO has no split {split!r}; choose one of {tuple(FOLDERS)}")
    root = Path(path).expanduser()
    existing(root / FOLDERS[split])
    return root, FOLDERS[split]


def _read(path: str | os.PathLike, split: str, table: str) -> tuple[Path, str, dict[str, Any]]:
    """The root, the folder of the pictures, and a table of annotations.

    Raises:
      FileNotFoundError: one of them is not there.
      ValueError: a split that there is not, or a file that is not JSON.
    """
    root, folder = _folder(path, split)
    return root, folder, read_json(root / "annotations" / f"{table}_{folder}.json")
