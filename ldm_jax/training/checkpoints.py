"""Checkpoints of a run, through orbax: asynchronous, atomic, the last few kept.

A step has two items: "state" (step, parameters, optimizer) and "ema". Sampling reads only the latter. The only file that
knows orbax.
"""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint import checkpoint_managers as policies

from ldm_jax import tree
from ldm_jax.types import TrainState


def _abstract(shapes: Any, shardings: Any) -> Any:
    def leaf(shape, sharding):
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    return jax.tree.map(leaf, shapes, shardings)


def _check_types(restored: Any, wanted: Any, where: str) -> None:
    """Orbax casts silently; a checkpoint of another dtype is another run's."""
    for name, got, want in zip(
        tree.names(wanted), jax.tree.leaves(restored), jax.tree.leaves(wanted), strict=True
    ):
        if got.dtype != want.dtype or got.shape != want.shape:
            raise ValueError(
                f"the checkpoint {where} holds {name!r} as {got.dtype}{list(got.shape)}, "
                f"the config wants {want.dtype}{list(want.shape)}; use the config that wrote it"
            )


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
        self._manager = ocp.CheckpointManager(self.path, options=options)

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, state: TrainState) -> None:
        """Starts writing; the state may be donated once this returns. Durable after `wait`."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state.replace(ema=None)),
            ema=ocp.args.StandardSave(state.ema),
        )
        if not self._manager.save(step, args=items, force=True):
            raise RuntimeError(
                f"orbax refused to save step {step} below {self.path}, where step {self.latest()} is the latest"
            )

    def restore(self, shapes: TrainState, shardings: TrainState) -> TrainState:
        """The latest state, born with these shardings.

        Raises:
          ValueError: another structure, shape or dtype than the config's.
        """
        step = self.latest()
        wanted = _abstract(shapes, shardings)
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(wanted.replace(ema=None)),
            ema=ocp.args.StandardRestore(wanted.ema),
        )
        restored = self._manager.restore(step, args=items)
        state = restored.state.replace(ema=restored.ema)
        _check_types(state, wanted, f"{self.path}/{step}")
        logging.info("restored step %d from %s", step, self.path)
        return state

    def wait(self) -> int | None:
        """Blocks until what was saved is durable; the step of the newest checkpoint."""
        self._manager.wait_until_finished()
        return self.latest()

    def close(self) -> None:
        self._manager.wait_until_finished()
        self._manager.close()


def load_ema(
    workdir: str | Path, shapes: Any, shardings: Any, step: int | None = None
) -> tuple[Any, int]:
    """The moving average of a run's parameters and the step that it is of; reads nothing else.

    Raises:
      FileNotFoundError: there is no run, or no checkpoint (or not that step) in it.
      ValueError: another structure, shape or dtype than that of the run's config.
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
    wanted = _abstract(shapes, shardings)
    with ocp.CheckpointManager(
        path, options=ocp.CheckpointManagerOptions(read_only=True)
    ) as manager:
        items = ocp.args.Composite(ema=ocp.args.StandardRestore(wanted))
        restored = manager.restore(step, args=items).ema
    _check_types(restored, wanted, f"{path}/{step}")
    return restored, step
