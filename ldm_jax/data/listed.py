"""The pictures of a folder that a text file names, one a line: how splits of LSUN, CelebA-HQ and FFHQ are published.

    listed(path="data/lsun/churches", names="data/lsun/church_outdoor_train.txt")

LSUN's databases (lmdb, see `lsun`) are written as files by the `data.py export` of its repository, with folders of a
letter each. Without a file of names `folder.folder(path, convention="none")` takes them all.
"""

import collections
import os
from pathlib import Path

from ldm_jax.data.folder import Folder
from ldm_jax.data.tables import existing, lines, of_rows


def listed(path: str | os.PathLike, names: str | os.PathLike) -> Folder:
    """The named pictures, relative to `path`.

    Raises:
      FileNotFoundError: the folder, the file, or a picture that it names is not there.
      ValueError: the file names none, or one twice.
    """
    root, file = existing(Path(path).expanduser()), Path(names).expanduser()
    found = lines(file)
    if twice := [name for name, count in collections.Counter(found).items() if count > 1]:
        raise ValueError(f"{file} names {twice[0]!r} more than once; keep one of them")
    return of_rows(f"{root.name} ({file.stem})", root, {name: {} for name in found})
