"""Checkpoints of a run, through orbax: asynchronous, atomic, the last few kept.

A step has two items: "state" (step, parameters, optimizer) and "ema". Sampling reads only the latter. The only file
that knows orbax.
"""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from ldm_jax import tree
from ldm_jax.types import TrainState

LEAST_SHARE = 2**20  # bytes of an array that a device writes, if several share it


class Unreadable(ValueError):
    """A checkpoint that is damaged, or another run's."""


def _abstract(shapes: Any, shardings: Any) -> Any:
    def leaf(shape, sharding):
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    return jax.tree.map(leaf, shapes, shardings)


def _check(held: Any, wanted: Any, path: Path) -> None:
    """Names, shapes and types agree; orbax itself would cast silently."""
    here = dict(zip(tree.names(held), jax.tree.leaves(held), strict=True))
    ours = dict(zip(tree.names(wanted), jax.tree.leaves(wanted), strict=True))
    for name in sorted(here.keys() | ours.keys()):
        got, want = (
            f"{side[name].dtype}{list(side[name].shape)}" if name in side else "nothing"
            for side in (here, ours)
        )
        if got != want:
            raise Unreadable(
                f"the checkpoint {path} holds {name!r} as {got}, the config wants {want}; use the config that wrote it"
            )


def _restore(path: Path, wanted: Any) -> Any:
    """One item of one step, born with the shardings of `wanted`.

    Raises:
      Unreadable: another structure, shape or dtype, or a file that is missing or damaged.
    """
    try:
        handler = ocp.PyTreeCheckpointHandler()
        _check(handler.metadata(epath.Path(path)).tree, wanted, path)
        with ocp.Checkpointer(handler) as reader:
            arguments = ocp.checkpoint_utils.construct_restore_args(wanted)
            restored = reader.restore(
                path, args=ocp.args.PyTreeRestore(item=wanted, restore_args=arguments)
            )
            return jax.block_until_ready(restored)
    except Unreadable:
        raise
    except Exception as error:  # damage shows as one of many kinds
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else ""
        raise Unreadable(
            f"the checkpoint {path} cannot be read ({type(error).__name__}: {reason}); it is damaged: remove the "
            f"folder {path.parent} to go on from the step before"
        ) from error


def _writer() -> ocp.PyTreeCheckpointHandler:
    """Devices that hold the same array share its writing only where each has a lot to write.

    Orbax shares every array by default, and cutting hundreds of small ones into slices takes seconds.
    """
    arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=LEAST_SHARE)
    kinds = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=kinds)


class Checkpoints:
    """The checkpoints below `workdir/checkpoints`."""

    def __init__(self, workdir: str | Path, keep: int = 3):
        self.path = Path(workdir).absolute() / "checkpoints"
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.LatestN(keep),
            save_decision_policy=policies.FixedIntervalPolicy(1),  # the loop decides when to save
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
        )
        writers = {"state": _writer(), "ema": _writer()}
        self._manager = ocp.CheckpointManager(self.path, options=options, item_handlers=writers)
        self._pending: list[int] = []

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, state: TrainState) -> None:
        """Starts writing; the state may be donated once this returns. Durable after `wait`."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state.replace(ema=None)),
            ema=ocp.args.PyTreeSave(state.ema),
        )
        if not self._manager.save(step, args=items, force=True):
            raise RuntimeError(
                f"orbax refused to save step {step} below {self.path}, where step {self.latest()} is the latest"
            )
        self._pending.append(step)

    def restore(self, shapes: TrainState, shardings: TrainState) -> TrainState:
        """The latest state, born with these shardings.

        Raises:
          Unreadable: another structure, shape or dtype than the config's, or damage.
        """
        step = self.latest()
        wanted = _abstract(shapes, shardings)
        state = _restore(self.path / str(step) / "state", wanted.replace(ema=None))
        state = state.replace(ema=_restore(self.path / str(step) / "ema", wanted.ema))
        logging.info("restored step %d from %s", step, self.path)
        return state

    def news(self) -> list[int]:
        """The steps that became durable since this was asked last."""
        self._manager.check_for_errors()
        if not self._pending or self._manager.is_saving_in_progress():
            return []
        done, self._pending = self._pending, []
        return done

    def wait(self) -> int | None:
        """Blocks until what was saved is durable; the step of the newest checkpoint."""
        self._manager.wait_until_finished()
        return self.latest()

    def close(self) -> None:
        self._manager.close()  # waits


def load_ema(
    workdir: str | Path, shapes: Any, shardings: Any, step: int | None = None
) -> tuple[Any, int]:
    """The moving average of a run's parameters and the step that it is of; reads nothing else.

    Raises:
      FileNotFoundError: there is no run, or no checkpoint (or not that step) in it.
      Unreadable: another structure, shape or dtype than that of the run's config, or damage.
    """
    path = Path(workdir).absolute() / "checkpoints"
    steps = sorted(int(p.name) for p in path.glob("*") if p.name.isdigit()) if path.is_dir() else []
    if not steps:
        raise FileNotFoundError(
            f"{workdir} holds no checkpoint; train there first: python train.py --config ... --workdir {workdir}"
        )
    if step is not None and step not in steps:
        raise FileNotFoundError(f"{path} holds no step {step}; it has {steps}")
    step = steps[-1] if step is None else step
    return _restore(path / str(step) / "ema", _abstract(shapes, shardings)), step
