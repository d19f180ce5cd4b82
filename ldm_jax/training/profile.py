"""A trace of chosen steps by JAX's profiler, for xprof (TensorBoard's profile plug-in) and Perfetto."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax


def steps_of(text: str | None) -> range:
    """START:STOP, the steps from START to before STOP; a run's first step is 1.

    Raises:
      ValueError: anything else.
    """
    if text is None:
        return range(0)
    start, colon, stop = text.partition(":")
    if not (colon and start.isdigit() and stop.isdigit() and 1 <= int(start) < int(stop)):
        raise ValueError(
            f"--profile={text} must be START:STOP, such as 20:25 for the steps 20 to 24; the first step is 1"
        )
    return range(int(start), int(stop))


class Profile:
    """Traces these steps into a folder; a process that begins within them traces the rest."""

    def __init__(self, folder: str | Path, steps: range):
        self.folder, self.steps, self._running = str(folder), steps, False

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around what a step does on the host."""
        if number not in self.steps:
            yield
            return
        if not self._running:
            jax.profiler.start_trace(self.folder)
            self._running = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def after(self, number: int, results: Any) -> bool:
        """Ends the trace when the last of its steps is done on the device; whether it did."""
        if not self._running or number + 1 in self.steps:
            return False
        jax.block_until_ready(results)
        self.close()
        return True

    def close(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
