"""How a run begins: its state, restored or born with its layouts; what the processes agree on; and a greeting."""

from typing import Any

import jax

from ldm_jax import tree
from ldm_jax.training import checkpoints, guards, logs, processes, sharding, step
from ldm_jax.training.run import Run
from ldm_jax.types import TrainState


def start_state(run: Run, saved: checkpoints.Checkpoints) -> tuple[TrainState, Any]:
    """The latest checkpoint, or fresh or pretrained parameters born with their shardings; and those shardings."""

    def fresh(key):
        return step.init_state(run.init(key), run.optimizer, run.ema)

    key = jax.random.key(run.seed)
    shapes = jax.eval_shape(fresh, key)
    layouts = sharding.state_layouts(run.mesh, run.rules, shapes)
    if saved.begun():
        return saved.restore(shapes, layouts), layouts
    if run.load is not None:
        begin = jax.jit(
            lambda params: step.init_state(params, run.optimizer, run.ema),
            donate_argnums=0,
            out_shardings=layouts,
        )
        return begin(run.load(layouts.params)), layouts
    return jax.jit(fresh, out_shardings=layouts)(key), layouts


def check_agreement(state: TrainState) -> None:
    """Raises: TrainingStopped: the processes do not start from the same parameters."""
    try:
        processes.agree_on_arrays("the parameter", state.params)
    except ValueError as error:
        raise guards.TrainingStopped(str(error)) from error


def greet(run: Run, state: TrainState, log: logs.Logs, over: bool) -> None:
    """Where the run goes on, and what it trains on what; `over`: it ended early."""
    at = int(state.step)
    if at:
        rest = "" if at < run.steps and not over else "; nothing is left to do"
        log.say(f"resumed at step {at} of {run.steps}{rest}")
    count = tree.count(state.params)
    devices = run.mesh.devices
    shape = " x ".join(f"{k} {v}" for k, v in run.mesh.shape.items() if v > 1)
    kind = f"{devices.size} {devices.flat[0].device_kind} device(s)"
    among = f" of {jax.process_count()} processes" if processes.several() else ""
    if run.told:
        log.say(run.told)
    log.say(f"{count:,} parameters on {kind}{among}{f': {shape}' if shape else ''}")
