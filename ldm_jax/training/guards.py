"""What keeps a run from going astray unwatched: roll-backs, loss spikes, hanging steps, early stopping.

All of it follows from what a resumed run knows as well: the state, and the lines of `metrics.jsonl` up to its step. A
roll-back takes the arrays of the last checkpoint and leaves the step where it is: data and noise are functions of the
step, so the run goes on with others and does not replay what failed.
"""

import contextlib
import faulthandler
import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from ldm_jax.training import logs
from ldm_jax.types import TrainState

LINES = 20  # of the log, with which a loss is compared; at least a quarter of them must be there
NORMAL = 1.4826  # a normal distribution's standard deviation over its median absolute deviation
ROLLED_BACK = "rolled_back_to"  # a line of the log


class TrainingStopped(RuntimeError):
    """The run cannot go on; what it has is saved."""


class Diverged(TrainingStopped):
    """The same, and its state is not worth saving."""


class Guards(NamedTuple):
    """What is watched; 0 turns each of the first four off."""

    rollbacks: int = 0  # in all of the run; after them it is stopped
    spike: float = 0.0  # a loss by so many (robust) standard deviations above its median; then 6 is a small number
    hang: float = 0.0  # seconds that a step may take
    patience: int = 0  # evaluations in a row that are no better than the best before
    metric: str = ""  # which of an evaluation's
    lowest: bool = True  # is best


def history(path: Path, name: str, until: int) -> dict[int, float]:
    """{step: value} of a metric in the lines of `metrics.jsonl` up to a step."""
    lines = logs.lines(path, until)
    return {line["step"]: line[name] for line in lines if line.get(name) is not None}


def spiked(before: Sequence[float], loss: float, limit: float) -> bool:
    """Whether a loss lies above the median of the last ones by `limit` standard deviations.

    The deviation is estimated by the median absolute deviation, which a spike among `before` hardly moves.
    """
    before = list(before)[-LINES:]
    if not limit or len(before) < LINES // 4:
        return False
    middle = statistics.median(before)
    deviation = NORMAL * statistics.median(abs(value - middle) for value in before)
    return loss > middle + limit * deviation


def stale(values: Sequence[float], patience: int, lowest: bool) -> bool:
    """Whether none of the last `patience` values is better than the best of those before."""
    if not patience or len(values) <= patience:
        return False
    best = min if lowest else max
    before, last = best(values[:-patience]), best(values[-patience:])
    return not (last < before if lowest else last > before)


class Course:
    """What a run has gone through: losses, scores and roll-backs. `scores` grow here and are read elsewhere, too."""

    def __init__(self, guards: Guards, log: Path, at: int, scores: dict[int, float]):
        self.guards, self.scores = guards, scores
        self.losses = list(history(log, "loss", at).values()) if guards.spike else []
        self.rolled_back = len(history(log, ROLLED_BACK, at))
        if guards.metric:
            scores.update(history(log, guards.metric, at))

    def spike(self, loss: float) -> str | None:
        """What is wrong with a loss, if it is far above the last ones; it is one of them from now on."""
        if not self.guards.spike or not math.isfinite(loss):
            return None
        jumped = spiked(self.losses, loss, self.guards.spike)
        middle = statistics.median(self.losses[-LINES:]) if jumped else 0.0
        self.losses.append(loss)
        return f"the loss jumped from {middle:.4g} to {loss:.4g}" if jumped else None

    def score(self, at: int, scalars: Mapping[str, float], whole: bool = True) -> None:
        """Notes the metric of an evaluation; one that was not `whole` need not have it.

        Raises:
          TrainingStopped: it has no metric of that name.
        """
        name = self.guards.metric
        if name and name not in scalars:
            if not whole:
                return
            raise TrainingStopped(
                f"log.metric = {name!r} is none of the evaluation's; choose among {sorted(scalars)}"
            )
        if name and math.isfinite(scalars[name]):
            self.scores[at] = float(scalars[name])

    def over(self) -> str | None:
        """Why the run has gone on for long enough, if it has."""
        values, patience = list(self.scores.values()), self.guards.patience
        if not stale(values, patience, self.guards.lowest):
            return None
        best = (min if self.guards.lowest else max)(self.scores, key=self.scores.get)
        return (
            f"{patience} evaluations in a row were no better than {self.guards.metric} = {self.scores[best]:.4g} "
            f"at step {best}"
        )

    def may_roll_back(self) -> bool:
        """Whether the last checkpoint is to be taken; counts it if so."""
        if self.rolled_back >= self.guards.rollbacks:
            return False
        self.rolled_back += 1
        return True


def moved_on(state: TrainState, at: int) -> TrainState:
    """The arrays of an earlier step as those of step `at`."""

    def like(old, value):
        return jax.device_put(np.asarray(value, old.dtype), old.sharding)

    return state.replace(step=like(state.step, at), skipped=like(state.skipped, 0))


class Watchdog:
    """Ends the process, with the stacks of all threads and status 1, when a step takes too long.

    faulthandler's own thread does it, which needs no interpreter: also if the step hangs within compiled code.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds

    @contextlib.contextmanager
    def on_duty(self) -> Iterator["Watchdog"]:
        try:
            yield self
        finally:
            self.rest()

    def watch(self) -> None:
        """The time counts from now, until `rest` or the next `watch`."""
        if self.seconds:
            # Not sys.stderr, which a notebook or a test may have replaced by no file.
            faulthandler.dump_traceback_later(self.seconds, exit=True, file=sys.__stderr__)

    def rest(self) -> None:
        """What comes now may take its time: a compile, an evaluation."""
        if self.seconds:
            faulthandler.cancel_dump_traceback_later()
