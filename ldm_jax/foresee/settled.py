"""What XLA writes down on its way: a program and its place in memory are settled long before the chips' code is made.

Of half an hour that a train step of Stable Diffusion takes to compile for TPUs, XLA needs two minutes; in the rest
libtpu makes each fusion's instructions, which changes neither what lies in HBM nor what chips tell each other. What it
may still find is a kernel that needs more VMEM than there is.
"""

import os
import re
import time
from pathlib import Path
from typing import NamedTuple

MODULES = "jit_(call|train_step)"  # samplers and train steps, by the names of their functions
QUIET = 3.0  # seconds in which a file has not grown: it is written


class Settled(NamedTuple):
    """A program after XLA's passes."""

    text: str
    peak: int  # bytes of HBM


def ask(folder: Path) -> None:
    """Programs of this process that are compiled from now on are written to `folder`; before jax has any backend.

    These flags are no part of the key of jax's compile cache.
    """
    own = f"--xla_dump_to={folder} --xla_dump_hlo_as_text --xla_dump_hlo_module_re={MODULES}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {own}".strip()


def text(folder: Path) -> str | None:
    """The newest program that was written there, or None."""
    found = _newest(folder, "after_optimizations.txt")
    return found.read_text() if found else None


def settled(folder: Path) -> Settled | None:
    """What is written there of a program, if all of it is.

    Raises:
      ValueError: the compiler's report of the memory is not as libtpu 0.0.51 writes it.
    """
    report = _newest(folder, "after_optimizations-memory-usage-report.txt")
    # The last of the files that are needed here.
    last = _newest(folder, "after_optimizations.txt")
    if report is None or last is None or time.time() - last.stat().st_mtime < QUIET:
        return None
    total = re.search(r"\(color=0\)\s+Total bytes: (\d+)", report.read_text())
    if total is None:
        raise ValueError(
            f"{report.name} does not tell the bytes of HBM; this version of libtpu writes it in another way: "
            "leave out --nocode"
        )
    return Settled(last.read_text(), int(total[1]))


def _newest(folder: Path, ending: str) -> Path | None:
    files = [file for file in folder.glob(f"*.{ending}") if re.search(MODULES, file.name)]
    return max(files, key=lambda file: file.stat().st_mtime, default=None)
