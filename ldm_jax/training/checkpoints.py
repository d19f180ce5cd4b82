"""Checkpoints of a run, through orbax: asynchronous, atomic, each with a manifest, some of them kept.

A step has two items: "state" (step, parameters, optimizer) and "ema". Sampling reads only the latter. A step counts as
saved when all of its files and their sums are on the disk (`manifest`), and is compared with them before it is read. A
save that fails (the disk is full) is told and stops nothing: older steps stay, and the next one is tried. Reading
is in `reading`.
"""

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from ldm_jax.training import manifest, reading
from ldm_jax.training.reading import FOLDER, Unreadable, load_ema
from ldm_jax.types import TrainState

__all__ = ["FOLDER", "Checkpoints", "Keep", "SaveFailed", "Unreadable", "load_ema"]

UNFINISHED = "{}.orbax-checkpoint-tmp*"  # how orbax calls a step that is being written
LEAST_SHARE = 2**20  # bytes of an array that a device writes, if several share it


class SaveFailed(RuntimeError):
    """The last state of a run is not on the disk."""


class Keep(NamedTuple):
    """Which steps stay: the `latest`, those that `every` divides, and the `best` by a score; 0: none of that kind."""

    latest: int = 3
    every: int = 0
    best: int = 0
    lowest: bool = True  # is best


def _writer() -> ocp.PyTreeCheckpointHandler:
    """Devices that hold the same array share its writing only where each has a lot to write.

    Orbax shares every array by default, and cutting hundreds of small ones into slices takes seconds.
    """
    arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=LEAST_SHARE)
    kinds = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=kinds)


def _brief(record: Any) -> bool:
    """A filter of the log: orbax tells of a save that fails in hundreds of lines, we tell in one.

    All of it is shown with --verbosity=0.
    """
    return (
        logging.get_verbosity() >= logging.INFO or "/orbax/" not in Path(record.pathname).as_posix()
    )


class _Retention:
    """Orbax's protocol of a policy: the steps with the best scores. Those without one do not count."""

    def __init__(self, keep: Keep, scores: Mapping[int, float]):
        self.keep, self.scores = keep, scores

    def should_preserve(self, checkpoints, *, context):
        scored = [c.step for c in checkpoints if c.step in self.scores]
        scored.sort(key=self.scores.get, reverse=not self.keep.lowest)
        best = set(scored[: self.keep.best])
        return [c.step in best for c in checkpoints]


class Checkpoints:
    """The checkpoints below `workdir/checkpoints`.

    With several processes all of them call `restore`, `save` and `wait` at the same steps. `scores`, of the steps that
    were evaluated, may grow.
    """

    def __init__(
        self, workdir: str | Path, keep: int | Keep = 3, scores: Mapping[int, float] | None = None
    ):
        logging.get_absl_logger().addFilter(_brief)
        self.path = Path(workdir).absolute() / FOLDER
        self._keep = keep if isinstance(keep, Keep) else Keep(keep)
        self._scores = {} if scores is None else scores
        self._manager = self._open()
        self._pending: int | None = None  # being written
        self._durable: list[int] = []  # not told yet
        self._trouble: list[str] = []  # the same
        self._lost: str | None = None  # why the newest state that was given is not on the disk

    def _open(self) -> ocp.CheckpointManager:
        stay = [policies.LatestN(self._keep.latest), _Retention(self._keep, self._scores)]
        if self._keep.every:
            stay.append(policies.EveryNSteps(self._keep.every))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(stay),
            save_decision_policy=policies.FixedIntervalPolicy(1),  # the loop decides when to save
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
            lightweight_initialize=True,  # a damaged step is no reason not to open the others
        )
        writers = {"state": _writer(), "ema": _writer()}
        return ocp.CheckpointManager(self.path, options=options, item_handlers=writers)

    def _seal(self) -> None:
        """Orbax calls this in its thread, in process 0, when all files of a step are written and it has no name yet."""
        (folder,) = self.path.glob(UNFINISHED.format(self._pending))
        manifest.write(folder)

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def begun(self) -> bool:
        """Whether there is, or was, a step."""
        return self.latest() is not None or bool(manifest.aside(self.path))

    def save(self, state: TrainState) -> None:
        """Starts writing; the state may be donated once this returns. Durable when `news` or `wait` says so."""
        step = int(state.step)
        self.settle()
        if self._any_process(self._lost is not None):
            self._reopen()  # orbax counts a step that failed as one that is there
        if step in self._manager.all_steps():
            return
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state.replace(ema=None)),
            ema=ocp.args.PyTreeSave(state.ema),
        )
        self._pending, self._lost = step, None
        try:
            begun = self._manager.save(
                step, args=items, force=True, custom_metadata=dict(manifest.MARK)
            )
        except Exception as error:  # a disk that is full or gone shows as one of many kinds
            self._failed(error)
        else:
            if not begun:
                raise RuntimeError(
                    f"orbax refused to save step {step} below {self.path}, where step {self.latest()} is the latest"
                )

    def settle(self) -> None:
        """Waits for the save that is under way, and notes how it ended."""
        try:
            self._manager.wait_until_finished()
            if self._pending is not None:
                manifest.sync_folder(self.path)
        except Exception as error:  # as above
            self._failed(error)
        if self._pending is not None:
            self._durable.append(self._pending)
            self._pending = None

    def _failed(self, error: Exception) -> None:
        self._lost = f"step {self._pending} could not be saved ({reading.one_line(error)})"
        self._trouble.append(self._lost)
        self._pending = None

    def _reopen(self) -> None:
        self._manager.close()
        if jax.process_index() == 0:
            self._remove_unfinished()
        self._manager = self._open()

    def _remove_unfinished(self, patience: float = 5.0) -> None:
        """What a failed save has left; tensorstore's threads may go on writing into it for a moment."""
        until = time.monotonic() + patience
        for folder in self.path.glob(UNFINISHED.format("*")):
            while folder.exists() and time.monotonic() < until:
                shutil.rmtree(folder, ignore_errors=True)
                time.sleep(0.05)

    def _any_process(self, here: bool) -> bool:
        if jax.process_count() == 1:
            return here
        return bool(np.any(multihost_utils.process_allgather(np.asarray(here))))

    def restore(self, shapes: TrainState, shardings: TrainState) -> TrainState:
        """The state of the newest step that is sound, born with these shardings; newer ones are moved aside.

        Raises:
          Unreadable: another structure, shape or dtype than the config's, or no step is sound.
        """
        self.settle()
        found = manifest.Found(None, ())
        if jax.process_index() == 0:
            found = manifest.newest_sound(self.path, move=True)
        step = -1 if found.step is None else found.step
        if jax.process_count() > 1:
            step = int(multihost_utils.broadcast_one_to_all(np.int64(step)))
        if self._any_process(step != self.latest()):
            self._reopen()
        if step < 0:
            wrong = "; ".join(found.passed) or f"all were moved aside, {manifest.aside(self.path)}"
            raise Unreadable(
                f"no checkpoint in {self.path} is sound: {wrong}; remove the folder to begin the run anew"
            )
        reading.tell(self.path, step, found.passed)
        wanted = reading.abstract(shapes, shardings)
        state = reading.item(self.path / str(step) / "state", wanted.replace(ema=None))
        state = state.replace(ema=reading.item(self.path / str(step) / "ema", wanted.ema))
        logging.info("restored step %d from %s", step, self.path)
        return state

    def news(self) -> list[int]:
        """The steps that became durable since this was asked last."""
        if self._pending is not None and not self._manager.is_saving_in_progress():
            self.settle()
        done, self._durable = self._durable, []
        return done

    def trouble(self) -> list[str]:
        """What went wrong with saves since this was asked last; ask for the news first."""
        told, self._trouble = self._trouble, []
        return told

    def wait(self) -> int | None:
        """Blocks until what was saved is durable; the step of the newest checkpoint.

        Raises:
          SaveFailed: the state that was given last is not on the disk.
        """
        self.settle()
        if self._lost is not None:
            raise SaveFailed(
                f"{self._lost}; the last step that is saved is {self.latest()}. Make room below {self.path} and give "
                "the same command again"
            )
        return self.latest()

    def close(self) -> None:
        self.settle()
        self._manager.close()
