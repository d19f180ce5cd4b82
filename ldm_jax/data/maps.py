"""A folder of pictures and a folder of their maps of classes: a.jpg and a.png, grey or with a palette."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ldm_jax.data import folder as folders
from ldm_jax.data import transforms

NONE = -1  # the class of a position that has none


@dataclass(frozen=True)
class Mapped:
    """A `pipeline.Source` whose records also have `segmentation`, int32 [h w]; see `folder`."""

    of: folders.Folder
    name: str
    fingerprint: str
    maps: tuple[str, ...] = field(repr=False)  # files
    void: int | None

    def __len__(self) -> int:
        return len(self.of)

    def __getitem__(self, index: int) -> dict[str, Any]:
        labels = transforms.decode_labels(Path(self.maps[index]).read_bytes())
        if self.void is not None:
            labels = np.where(labels == self.void, NONE, labels)
        return self.of[index] | {"segmentation": labels}

    @property
    def classes(self) -> tuple[str, ...] | None:
        return self.of.classes

    @property
    def fields(self) -> tuple[str, ...]:
        return (*self.of.fields, "segmentation")

    def only(self, fields: Sequence[str]) -> Any:
        """The same records, without maps where they are not asked for."""
        return self if "segmentation" in fields else self.of.only(fields)

    def name_of(self, index: int) -> str:
        return self.of.name_of(index)

    def captions(self) -> Iterator[str]:
        return self.of.captions()


def folder(
    path: str | os.PathLike,
    maps: str | os.PathLike,
    *,
    split: str = "all",
    holdout: float = 0.05,
    convention: str = "none",
    void: int | None = None,
) -> Mapped:
    """The pictures below `path`, as `folder.folder` has them, each with its map below `maps`.

    Args:
      void: the number that means no class in the maps; it becomes `NONE`.

    Raises:
      FileNotFoundError: a folder, or a picture's map, that is not there.
      ValueError: see `folder.folder`.
    """
    of = folders.folder(path, split=split, holdout=holdout, convention=convention)
    where = Path(maps).expanduser()
    files = [(where / name).with_suffix(".png") for name in of.files]
    if absent := [file for file in files if not file.is_file()]:
        raise FileNotFoundError(
            f"{len(absent)} of the {len(files)} pictures of {of.name} have no map, the first that is missing is "
            f"{str(absent[0])!r}; give each picture a map of its name"
        )
    digest = hashlib.sha256(of.fingerprint.encode())
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size} ".encode())
    digest.update(str(void).encode())
    return Mapped(of, f"{of.name} with maps", digest.hexdigest(), tuple(map(str, files)), void)
