"""What a run does in trouble: it rolls back to its last checkpoint, or stops with the name of the first bad leaf."""

from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax import tree
from ldm_jax.training import checkpoints, guards, logs
from ldm_jax.training.guards import TrainingStopped
from ldm_jax.training.run import Run
from ldm_jax.training.start import start_state
from ldm_jax.types import Params, TrainState


def first_bad_leaf(arrays: Params) -> str | None:
    """The name of the first leaf that holds a NaN or an infinity."""
    for name, leaf in zip(tree.names(arrays), jax.tree.leaves(arrays), strict=True):
        if not bool(jnp.isfinite(leaf).all()):
            return name
    return None


def state_after(
    run: Run,
    state: TrainState,
    batch: Any,
    loss: float,
    saved: checkpoints.Checkpoints,
    course: guards.Course,
    log: logs.Logs,
) -> TrainState:
    """The state to go on with at the end of a window: this one, or after too much trouble the last checkpoint's.

    Raises:
      TrainingStopped: the run may not be rolled back (any more).
    """
    at, in_a_row, trouble = int(state.step), int(state.skipped), course.spike(loss)
    if in_a_row:
        log.say(f"step {at}: {in_a_row} step(s) in a row were not finite and were skipped")
    if in_a_row >= run.max_skipped:
        trouble = f"{in_a_row} steps in a row were not finite (allowed: {run.max_skipped})"
    if trouble is None:
        return state
    if course.may_roll_back():
        jax.tree.map(lambda a: a.delete(), state)  # there may be no room for both
        state, _ = start_state(run, saved)
        to = int(state.step)
        log.scalars(at, {guards.ROLLED_BACK: float(to)})
        log.say(
            f"step {at}: {trouble}; rolled back to step {to} (roll-back {course.rolled_back} of "
            f"{run.guards.rollbacks}), and data and noise go on from step {at}"
        )
        return guards.moved_on(state, at)
    if in_a_row < run.max_skipped:
        raise guards.Diverged(
            f"step {at}: {trouble}; its state is not saved, and the same command goes on from the last checkpoint with "
            "the same data: lower the learning rate, allow roll-backs by guards.rollbacks, or raise guards.spike"
        )
    raise TrainingStopped(
        f"{trouble}; {_first_bad(run, state, batch)}. "
        "Parameters, optimizer and EMA are those of the last good step; lower the learning rate, clip gradients, or "
        "look at the data"
    )


def _first_bad(run: Run, state: TrainState, batch: Any) -> str:
    """Where the trouble begins: the data, the parameters, or the gradient with the noise of the last step."""

    def gradient():
        key = jax.random.fold_in(jax.random.key(run.seed + 1), state.step - 1)
        of = jax.jit(jax.grad(run.loss, has_aux=True))
        return of(state.params, run.frozen, batch, key, state.step - 1)[0]

    places = {"batch": lambda: batch, "parameters": lambda: state.params}
    if run.accumulate == 1:  # a whole batch at once may not fit otherwise
        places["gradient"] = gradient
    for place, arrays in places.items():
        if name := first_bad_leaf(arrays()):
            return f"the first bad leaf is {name!r} of the {place}"
    return "batch and parameters are finite, the loss or its gradient is not"
