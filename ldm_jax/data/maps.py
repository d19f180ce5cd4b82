"""A folder of pictures and a folder of their maps of classes: a.jpg and a.png, grey or with a palette."""

import functools
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from ldm_jax.data import folder as folders
from ldm_jax.data import transforms
from ldm_jax.data.beside import Beside
from ldm_jax.data.examples import SEGMENTATION

NONE = -1  # the class of a position that has none


def folder(
    path: str | os.PathLike,
    maps: str | os.PathLike,
    *,
    split: str = "all",
    holdout: float = 0.05,
    convention: str = "none",
    void: int | None = None,
) -> Beside:
    """The pictures below `path`, as `folder.folder` has them, each with its map below `maps`.

    Records also have `segmentation`, int32 [h w].

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
    read = functools.partial(_map, tuple(map(str, files)), void)
    return Beside(of, f"{of.name} with maps", digest.hexdigest(), SEGMENTATION, read)


def _map(files: Sequence[str], void: int | None, index: int) -> Int[np.ndarray, "h w"]:
    labels = transforms.decode_labels(Path(files[index]).read_bytes())
    return labels if void is None else np.where(labels == void, NONE, labels)
