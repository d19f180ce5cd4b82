"""A folder of pictures, with captions or labels in one of the usual ways.

    metadata.jsonl   {"file_name": "a.png", "text": "a red circle"}, one line a picture
    metadata.csv     the same, with a header
    txt              a.png and a.txt side by side
    classes          cat/a.png, dog/b.png: the label is the number of the folder in alphabetical
                     order
    none             pictures alone

The way is found by looking; where two are possible it must be named. Every picture must have its
caption and every caption its picture. Further columns of the metadata (numbers, or lists of
numbers) become fields of the records, a column "label" the label.
"""

import collections
import concurrent.futures
import csv
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from jaxtyping import Int

from ldm_jax.data import transforms
from ldm_jax.data.examples import captions_of

THREADS = 16  # that read headers
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
CONVENTIONS = ("metadata.jsonl", "metadata.csv", "txt", "classes", "none")
_SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test"}


@dataclass(frozen=True)
class Folder:
    """The pictures of a folder by number; see `folder`."""

    name: str
    fingerprint: str
    root: str
    files: tuple[str, ...] = field(repr=False)  # below the root, sorted
    rows: tuple[dict[str, Any], ...] = field(repr=False)  # caption, label, ... of each picture
    classes: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": Path(self.root, self.files[index]).read_bytes(), **self.rows[index]}

    @property
    def fields(self) -> tuple[str, ...]:
        return ("image", *self.rows[0])

    def only(self, fields: Sequence[str]) -> "Folder":
        """The same records; they are in memory, so there is nothing to save."""
        return self

    def name_of(self, index: int) -> str:
        return str(Path(self.root, self.files[index]))

    def sizes(self) -> Int[np.ndarray, "n 2"]:
        """(h, w) of every picture, by its header; (0, 0) of one that cannot be read. Takes 0.1 ms a picture."""
        paths = (Path(self.root, name) for name in self.files)
        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            return np.array(list(pool.map(transforms.size_of, paths)), np.int64)

    def captions(self) -> Iterator[str]:
        return (text for row in self.rows if "caption" in row for text in captions_of(row))


def folder(
    path: str | os.PathLike,
    *,
    split: str = "all",
    holdout: float = 0.05,
    convention: str | None = None,
    caption_column: str = "text",
) -> Folder:
    """The pictures below `path` (the imagefolder convention of Hugging Face, and its relatives).

    Args:
      split: "all", or "validation" for a share `holdout` that the hash of the file name picks, and
        "train" for the rest: files that are added later move no other file.
      convention: one of `CONVENTIONS`; found by looking where it is not given.
      caption_column: the column of the metadata that holds the caption.

    Raises:
      FileNotFoundError: no such folder.
      ValueError: no picture, none that can be read, or captions that do not match the pictures.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(
            f"there is no folder {str(root)!r}; give the folder that holds the pictures"
        )
    if split not in ("train", "validation", "all") or not 0 < holdout < 1:
        raise ValueError(
            f"split={split!r}, holdout={holdout}: choose 'train', 'validation' or 'all', "
            "and a share between 0 and 1"
        )
    listing = _listing(root)
    pictures = sorted(name for name in listing if name.lower().endswith(SUFFIXES))
    if not pictures:
        raise ValueError(
            f"the folder {str(root)!r} holds no picture; known are {', '.join(SUFFIXES)}"
        )
    convention = _convention(root, listing, pictures, convention)
    classes = None
    if convention == "classes":
        rows, classes = _class_rows(root, pictures)
    elif convention == "txt":
        rows = _text_rows(root, listing, pictures)
    elif convention == "none":
        rows = {name: {} for name in pictures}
    else:
        rows = _metadata_rows(root / convention, pictures, caption_column)
    _check_readable(root, pictures)

    chosen = [
        name
        for name in pictures
        if split == "all" or _held_out(name, holdout) == (split == "validation")
    ]
    if not chosen:
        raise ValueError(
            f"the {split} split of the {len(pictures)} pictures in {str(root)!r} is empty; "
            "change holdout"
        )
    digest = hashlib.sha256(json.dumps([split, len(chosen), classes]).encode())
    for name in chosen:
        digest.update(json.dumps([name, listing[name], rows[name]], sort_keys=True).encode())
    return Folder(
        name=f"{root.name} ({split})",
        fingerprint=digest.hexdigest(),
        root=str(root),
        files=tuple(chosen),
        rows=tuple(rows[name] for name in chosen),
        classes=classes,
    )


def _listing(root: Path) -> dict[str, int]:
    """The files below the root, with forward slashes, and their bytes; hidden ones left out."""
    sizes = {}
    for directory, below, _ in os.walk(root, followlinks=True):
        below[:] = sorted(name for name in below if not name.startswith("."))
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.is_file() and not entry.name.startswith("."):
                    sizes[Path(entry.path).relative_to(root).as_posix()] = entry.stat().st_size
    return sizes


def _convention(root: Path, listing: dict[str, int], pictures: list[str], given: str | None) -> str:
    if given is not None and given not in CONVENTIONS:
        raise ValueError(f"unknown convention {given!r}; choose one of {CONVENTIONS}")
    found = [name for name in ("metadata.jsonl", "metadata.csv") if name in listing]
    stems = {_stem(name) for name in pictures}
    if any(name.endswith(".txt") and _stem(name) in stems for name in listing):
        found.append("txt")
    nested = [name for name in pictures if "/" in name]
    if nested and found in ([], ["txt"]):
        found.append("classes")
    if given is not None:
        if given.startswith("metadata") and given not in found:
            raise FileNotFoundError(f"there is no file {given!r} in {str(root)!r}")
        return given
    if len(found) > 1:
        raise ValueError(
            f"{str(root)!r} describes its pictures in more than one way: {' and '.join(found)}; "
            f"remove one, or name the one to use: convention={found[0]!r}"
        )
    return found[0] if found else "none"


def _class_rows(root: Path, pictures: list[str]) -> tuple[dict[str, dict], tuple[str, ...]]:
    outside = [name for name in pictures if "/" not in name]
    if outside:
        raise ValueError(
            f"{len(outside)} of {len(pictures)} pictures lie outside the class folders of "
            f"{str(root)!r}, the first is "
            f"{outside[0]!r}; move them into a folder, or ignore the folders with convention='none'"
        )
    classes = tuple(sorted({name.split("/")[0] for name in pictures}))
    if {name.lower() for name in classes} <= _SPLIT_NAMES:
        raise ValueError(
            f"the folders {classes} of {str(root)!r} are splits, not classes; give one of them, "
            f"as {str(root / classes[0])!r}"
        )
    numbers = {name: number for number, name in enumerate(classes)}
    return {name: {"label": numbers[name.split("/")[0]]} for name in pictures}, classes


def _text_rows(root: Path, listing: dict[str, int], pictures: list[str]) -> dict[str, dict]:
    texts = {_stem(name): name for name in listing if name.endswith(".txt")}
    _check_match(
        root,
        without=[name for name in pictures if _stem(name) not in texts],
        orphans=sorted(set(texts.values()) - {texts.get(_stem(name)) for name in pictures}),
        remedy="give each picture a .txt file of its name, and each .txt file a picture",
    )
    rows = {}
    for name in pictures:
        try:
            rows[name] = {
                "caption": (root / texts[_stem(name)]).read_text(encoding="utf-8").strip()
            }
        except UnicodeDecodeError as error:
            raise ValueError(
                f"the caption {str(root / texts[_stem(name)])!r} is not UTF-8 text"
            ) from error
    return rows


def _metadata_rows(path: Path, pictures: list[str], caption_column: str) -> dict[str, dict]:
    rows, orphans, known = {}, [], set(pictures)
    for where, row in _read_metadata(path):
        name = row.pop("file_name", None)
        if not isinstance(name, str):
            raise ValueError(f"{where} names no picture; it needs a column 'file_name'")
        if caption_column not in row:
            raise ValueError(
                f"{where} has no column {caption_column!r} for the caption; choose one of "
                f"{sorted(row)} with caption_column"
            )
        caption = row.pop(caption_column)
        if not isinstance(caption, str):
            raise ValueError(f"the caption of {name!r} in {where} is {caption!r}, not text")
        name = PurePosixPath(name).as_posix()
        if name in rows:
            raise ValueError(
                f"{where} names the picture {name!r} a second time; keep one of the two"
            )
        if name not in known:
            orphans.append(name)
        rows[name] = {**row, "caption": caption}
    _check_match(
        path,
        without=[name for name in pictures if name not in rows],
        orphans=orphans,
        remedy="make file_name agree with the files, relative to the folder",
    )
    columns = collections.Counter(key for row in rows.values() for key in row)
    partial = sorted(key for key, count in columns.items() if count < len(rows))
    if partial:
        raise ValueError(
            f"{str(path)!r}: the columns {partial} are missing in some rows; complete or drop them"
        )
    return rows


def _read_metadata(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".csv":
            for number, row in enumerate(csv.DictReader(file), start=2):
                if None in row or None in row.values():
                    raise ValueError(
                        f"row {number} of {str(path)!r} has another number of cells than the header"
                    )
                yield f"row {number} of {str(path)!r}", row
            return
        for number, line in enumerate(file, start=1):
            where = f"line {number} of {str(path)!r}"
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{where} is not an object with a file_name and a text")
            yield where, row


def _check_match(where: Path, *, without: list[str], orphans: list[str], remedy: str) -> None:
    problems = []
    if without:
        problems.append(f"{len(without)} without a caption, the first is {without[0]!r}")
    if orphans:
        problems.append(f"{len(orphans)} without a picture, the first is {orphans[0]!r}")
    if problems:
        raise ValueError(
            f"captions and pictures of {str(where)!r} do not match: {'; '.join(problems)}; {remedy}"
        )


def _check_readable(root: Path, pictures: list[str]) -> None:
    """At least one picture can be decoded; single broken ones are the pipeline's business."""
    first = None
    for name in pictures:
        try:
            transforms.decode((root / name).read_bytes())
            return
        except (transforms.BadImage, OSError) as error:
            first = first or f"{name!r} {error}"
    raise ValueError(
        f"none of the {len(pictures)} pictures in {str(root)!r} can be read; the first: {first}"
    )


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def _held_out(name: str, share: float) -> bool:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) < share * 2**64
