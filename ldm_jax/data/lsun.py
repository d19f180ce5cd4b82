"""LSUN as it is published: databases (lmdb) of WebP pictures, one for a category and a split.

data/lsun/bedroom_train_lmdb/data.mdb, data/lsun/bedroom_val_lmdb/data.mdb, data/lsun/church_outdoor_train_lmdb/data.mdb

Keys are 40 digits each, in whose order the pictures stand; CompVis' splits are lists of these keys, with `.webp` behind
them. Reading needs the package lmdb (the extra `lsun`).
"""

import functools
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ldm_jax.data.tables import existing, lines

SPLITS = dict(train="train", validation="val")  # ours and theirs


@dataclass(frozen=True, eq=False)
class Database:
    """A `records.Source` of a database's pictures; opened where it is read, so that workers get none of it."""

    name: str
    fingerprint: str
    root: str
    keys: np.ndarray = field(repr=False)  # bytes
    classes: None = None

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> dict[str, Any]:
        with _opened(self.root, os.getpid()).begin() as reading:
            return {"image": reading.get(self.keys[index])}

    @property
    def fields(self) -> tuple[str, ...]:
        return ("image",)

    def only(self, fields: Sequence[str]) -> "Database":
        """The same records; they have one field."""
        return self

    def name_of(self, index: int) -> str:
        return f"{self.keys[index].decode()} of {self.root}"

    def captions(self) -> Iterator[str]:
        return iter(())


def lsun(
    path: str | os.PathLike, *, split: str = "train", names: str | os.PathLike | None = None
) -> Database:
    """The pictures of a category: path "data/lsun/bedroom" is of the folder data/lsun/bedroom_train_lmdb.

    Args:
      split: "train" or "validation".
      names: a file of keys, one a line, with or without a suffix: those that are taken.

    Raises:
      FileNotFoundError: no such database or file.
      ValueError: the package lmdb is not installed, another split, a database of nothing, or keys that it has not.
    """
    if split not in SPLITS:
        raise ValueError(f"LSUN has no split {split!r}; choose one of {tuple(SPLITS)}")
    root = Path(f"{Path(path).expanduser()}_{SPLITS[split]}_lmdb")
    existing(root / "data.mdb")
    with _opened(str(root), os.getpid()).begin() as reading:
        keys = np.array(list(reading.cursor().iternext(keys=True, values=False)))
    if not len(keys):
        raise ValueError(f"the database {str(root)!r} is empty; download it anew")
    if names is not None:
        wanted = np.array(sorted({Path(line).stem.encode() for line in lines(Path(names))}))
        absent = wanted[~np.isin(wanted, keys)]
        if len(absent):
            raise ValueError(
                f"{len(absent)} of the {len(wanted)} pictures that {names} names are not in {str(root)!r}, the first "
                f"is {absent[0].decode()!r}; give the list of this category and split"
            )
        keys = wanted
    digest = hashlib.sha256(root.name.encode() + np.ascontiguousarray(keys).tobytes())
    return Database(root.name, digest.hexdigest(), str(root), keys)


@functools.lru_cache(maxsize=8)
def _opened(root: str, process: int) -> Any:
    """The environment, one a process: what was opened before a fork cannot be used after it."""
    try:
        import lmdb
    except ImportError as error:
        raise ValueError(
            "LSUN's databases need the package lmdb: pip install 'ldm_jax[lsun]', or write them as files by the "
            "data.py export of LSUN's repository"
        ) from error
    try:
        return lmdb.open(root, readonly=True, lock=False, readahead=False, meminit=False)
    except lmdb.Error as error:
        raise ValueError(
            f"the database {root!r} cannot be read ({error}); download it anew"
        ) from error
