"""What is gathered between two lines of the log: metrics, which stay on the device, and the clock."""

import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from ldm_jax.training.guards import TrainingStopped

AHEAD = 2  # steps handed to the device before the oldest of them is waited for: each holds a batch


class Window:
    """The metrics and the clock since the last line of the log; time for evaluations does not count."""

    def __init__(self):
        self.metrics: list[dict[str, Any]] = []
        self._restart()

    def _restart(self) -> None:
        self.steps, self.waited, self._since = 0, 0.0, time.perf_counter()

    def next_of(self, batches: Iterator[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """The next batch; notes how long it took.

        Raises:
          TrainingStopped: the data cannot be read.
        """
        asked = time.perf_counter()
        try:
            return next(batches)
        except (ValueError, OSError) as error:
            raise TrainingStopped(str(error)) from error
        finally:
            self.waited += time.perf_counter() - asked

    def add(self, metrics: dict[str, Any]) -> None:
        self.metrics.append(metrics)
        self.steps += 1
        if len(self.metrics) > AHEAD:
            jax.block_until_ready(self.metrics[-1 - AHEAD])

    def restart_clock(self) -> None:
        """Forgets times, not metrics: after a compile or an evaluation."""
        jax.block_until_ready(self.metrics)
        self._restart()

    def close(self) -> dict[str, float]:
        """Means over the window's steps, and its rate; the next window begins."""
        fetched = jax.device_get(self.metrics)
        columns = {k: np.asarray([m[k] for m in fetched], np.float64) for k in fetched[0]}
        # NaN marks a value that a step does not have: an empty time bin.
        values = {
            k: float(np.nanmean(v)) if np.isfinite(v).any() else np.nan for k, v in columns.items()
        }
        if self.steps:
            seconds = time.perf_counter() - self._since
            values["steps_per_second"] = self.steps / seconds
            values["waiting_for_data"] = self.waited / seconds
        self.metrics = []
        self._restart()
        return values
