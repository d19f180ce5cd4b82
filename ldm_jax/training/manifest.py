"""Which steps of a run are sound: a manifest of sha256 sums, and what lies in a folder of checkpoints.

orbax checks no values: a flipped byte is restored as other weights without a word, and a step that was truncated,
emptied or half deleted stays its latest. So a step takes a manifest along, in the format of sha256sum (`sha256sum -c
manifest.sha256` checks it), whose first line is a comment with the sum of the other lines. It is written before the
folder gets the step's name, by which orbax commits it: a step has all of its files and their manifest, or its save was
cut short and it is no step. A step that is damaged is moved aside, never deleted.
"""

import concurrent.futures
import hashlib
import json
import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

NAME = "manifest.sha256"
METADATA = "_CHECKPOINT_METADATA"
NOTES = (
    METADATA,
    "commit_success.txt",
)  # orbax's notes on a step, which it still writes afterwards
MARK = {"manifest": NAME}  # in the former: this step has a manifest, or had one
COMMENT = "# sha256 of the lines below: "


def write(folder: Path) -> None:
    """The manifest of all files below `folder`; the files, the folders and it are on the disk when this returns."""
    left_out = [folder / name for name in (NAME, *NOTES)]
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p not in left_out)
    sums = _sums(files, sync=True)
    lines = [f"{s}  {p.relative_to(folder).as_posix()}\n" for s, p in zip(sums, files, strict=True)]
    body = "".join(lines).encode()
    with (folder / NAME).open("wb") as file:
        file.write(f"{COMMENT}{hashlib.sha256(body).hexdigest()}\n".encode() + body)
        file.flush()
        os.fsync(file.fileno())
    for inner in [p for p in folder.rglob("*") if p.is_dir()] + [folder]:
        sync_folder(inner)


def sync_folder(folder: Path) -> None:
    """The names in a folder are on the disk when this returns."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _sums(files: Sequence[Path], sync: bool = False) -> list[str]:
    """Hashing leaves the interpreter's lock alone, so that several files are read at once."""

    def of(path):
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
            if sync:
                os.fsync(file.fileno())
        return found

    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(of, files))


def problem(step: Path, below: str = "") -> str | None:
    """What is wrong with the files of a step (or with those below one of its folders); None: nothing.

    A step of an older run has no manifest and is not known to be damaged, see `checked`.
    """
    try:
        wanted = _read(step / NAME)
        if wanted is None:
            return None if _without(step) else "its manifest is missing"
        wanted = {name: of for name, of in wanted.items() if Path(name).is_relative_to(below)}
        missing = [name for name in wanted if not (step / name).is_file()]
        if missing:
            return f"{len(missing)} of its {len(wanted)} files are missing, such as {missing[0]}"
        sums = _sums([step / name for name in wanted])
    except (OSError, ValueError) as error:
        return str(error)
    other = [name for name, found in zip(wanted, sums, strict=True) if found != wanted[name]]
    if other:
        return (
            f"{len(other)} of its {len(wanted)} files are not what was written, such as {other[0]}"
        )
    return None


def checked(step: Path) -> bool:
    """Whether there is a manifest; a step of an older run has none."""
    return (step / NAME).is_file()


def _read(path: Path) -> dict[str, str] | None:
    """{name of a file: its sum}, or None without a manifest.

    Raises:
      ValueError: it is damaged.
    """
    if not path.is_file():
        return None
    first, _, body = path.read_bytes().partition(b"\n")
    if first.decode("ascii", "replace") != COMMENT + hashlib.sha256(body).hexdigest() or not body:
        raise ValueError("its manifest is damaged")
    pairs = [line.split("  ", 1) for line in body.decode().splitlines()]
    return {name: of for of, name in pairs}


def _without(step: Path) -> bool:
    """Whether a step was written before there were manifests: it has orbax's notes, and they know of none."""
    try:
        notes = json.loads((step / METADATA).read_text())
        return "manifest" not in (notes.get("custom_metadata") or {})
    except (OSError, ValueError, AttributeError):
        return False


def steps(folder: Path) -> list[int]:
    """The steps in a folder of checkpoints, damaged ones as well, oldest first."""
    return sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit() and p.is_dir())


def aside(folder: Path) -> list[str]:
    """The names of the steps that were moved aside."""
    return sorted(p.name for p in folder.glob("bad_*"))


class Found(NamedTuple):
    step: int | None  # the newest that is sound
    passed: tuple[str, ...]  # a clause for every newer one


def newest_sound(folder: Path, below: str = "", move: bool = False) -> Found:
    """The newest step whose files (below one of its folders) are those that were written.

    With `move` the damaged ones that are newer become `bad_STEP_TIME`.
    """
    passed = []
    for step in reversed(steps(folder)):
        wrong = problem(folder / str(step), below)
        if wrong is None:
            return Found(step, tuple(passed))
        kept = ""
        if move:
            name = f"bad_{step}_{datetime.now():%Y%m%dT%H%M%S.%f}"
            (folder / str(step)).rename(folder / name)
            kept = f" and is kept as {name}"
        passed.append(f"step {step} is damaged ({wrong}){kept}")
    return Found(None, tuple(passed))
