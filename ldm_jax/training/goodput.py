"""Goodput: which share of its time a run trained, over all its starts, and what the rest was spent on.

Every second from the start of a process to its end belongs to one cause:

    train      steps that count
    data       waiting for a batch (the device may still be busy with the steps before)
    compile    the first step of a process
    evaluate   validation and samples
    save       what a checkpoint holds the loop up for
    start      from the start of the process to the first batch: libraries, data, parameters
    lost       steps that were run, and again after a restart from the checkpoint before them

`goodput.json` keeps the sums; the time between two processes is in none of them, since nobody knows whether anyone
waited. What a process that was killed did after it wrote the file last is not known either.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ldm_jax.training import processes

CAUSES = ("train", "data", "compile", "evaluate", "save", "start", "lost")
MARKS = 1000  # lines of the log whose time is remembered, for steps that may be lost


class Clock:
    """Adds the time of a process to that of those before it; at first the cause is "start".

    `began` and `now` are seconds of one clock. `step` is where this process goes on: training time of later steps,
    of which an earlier process has told, is lost.
    """

    def __init__(
        self,
        workdir: str | Path,
        step: int,
        began: float,
        now: Callable[[], float] = time.perf_counter,
    ):
        self.path, self._now = Path(workdir) / "goodput.json", now
        before = json.loads(self.path.read_text()) if self.path.is_file() else {}
        self.starts = before.get("starts", 0) + 1
        self.seconds = dict.fromkeys(CAUSES, 0.0) | before.get("seconds", {})
        marks = before.get("marks") or [[step, self.seconds["train"]]]
        at, trained = (np.array(column, float) for column in zip(*marks, strict=True))
        lost = self.seconds["train"] - float(np.interp(step, at, trained))
        self.seconds["train"] -= lost
        self.seconds["lost"] += lost
        self._marks = [mark for mark in marks if mark[0] < step] + [[step, self.seconds["train"]]]
        self.cause, self._since = "start", began

    def turn(self, cause: str) -> None:
        """From now on time is of this cause."""
        now = self._now()
        self.seconds[self.cause] += now - self._since
        self.cause, self._since = cause, now

    @contextlib.contextmanager
    def of(self, cause: str) -> Iterator[None]:
        """Time within is of this cause, then again of the one before."""
        before = self.cause
        self.turn(cause)
        try:
            yield
        finally:
            self.turn(before)

    def shares(self) -> dict[str, float]:
        """`goodput`, the share of training, and those of all causes as `goodput/CAUSE`; they sum to 1."""
        self.turn(self.cause)
        whole = max(sum(self.seconds.values()), 1e-9)
        shares = {f"goodput/{cause}": self.seconds[cause] / whole for cause in CAUSES}
        return {"goodput": shares.pop("goodput/train")} | shares

    def write(self, step: int) -> None:
        """Keeps the sums, and what training up to this step took; of several processes the first does."""
        self.turn(self.cause)
        if not processes.first():
            return
        self._marks = [mark for mark in self._marks if mark[0] < step][-MARKS:]
        self._marks.append([step, self.seconds["train"]])
        kept = {"starts": self.starts, "seconds": self.seconds, "marks": self._marks}
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(kept) + "\n")
        os.replace(temporary, self.path)

    def told(self) -> str:
        """One line for the end of a run."""
        shares = self.shares()
        rest = ", ".join(
            f"{cause} {shares[f'goodput/{cause}']:.1%}"
            for cause in CAUSES[1:]
            if shares[f"goodput/{cause}"] >= 0.0005
        )
        starts = f" in {self.starts} starts" if self.starts > 1 else ""
        whole = sum(self.seconds.values())
        return f"goodput {shares['goodput']:.1%} of {whole:.0f} s{starts}{f' ({rest})' if rest else ''}"
