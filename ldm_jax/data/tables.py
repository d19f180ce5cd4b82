"""What readers of published data sets share: files that must be there, and rows that become a source."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm_jax.data.folder import Folder


def existing(path: Path) -> Path:
    """The path, after a look whether it is there.

    Raises:
      FileNotFoundError: it is not.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"there is no {str(path)!r}; give the folder in which the data set lies as it was published"
        )
    return path


def read_json(path: Path) -> Any:
    """Raises: ValueError: a file that is not JSON."""
    try:
        return json.loads(existing(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); download it anew") from error


def lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank."""
    return [line.strip() for line in existing(path).read_text().splitlines() if line.strip()]


def of_rows(
    name: str, root: Path, rows: Mapping[str, dict[str, Any]], classes: Sequence[str] | None = None
) -> Folder:
    """A source of the pictures below `root` that `rows` name, with what they know of each.

    Raises:
      ValueError: there is no row.
      FileNotFoundError: a picture that is not there.
    """
    if not rows:
        raise ValueError(f"{name} names no picture of {str(root)!r}")
    files = tuple(sorted(rows))
    if absent := [file for file in files if not (root / file).is_file()]:
        raise FileNotFoundError(
            f"{len(absent)} of {len(files)} pictures of {name} are not in {str(root)!r}, the first is {absent[0]!r}; "
            "add them, or take them out of the list"
        )
    digest = hashlib.sha256(json.dumps([name, classes]).encode())
    for file in files:
        digest.update(json.dumps([file, rows[file]], sort_keys=True).encode())
    return Folder(
        name=name,
        fingerprint=digest.hexdigest(),
        root=str(root),
        files=files,
        rows=tuple(rows[file] for file in files),
        classes=None if classes is None else tuple(classes),
    )
