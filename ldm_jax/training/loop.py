"""The loop of every run: restore or initialise, step, log, evaluate, save; a signal saves and ends it."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from absl import logging
from jax.sharding import Mesh

from ldm_jax import tree
from ldm_jax.training import checkpoints, logs, sharding, step
from ldm_jax.types import Loss, Params


class Evaluation(NamedTuple):
    scalars: dict[str, float]
    images: dict[str, np.ndarray]


class Run(NamedTuple):
    """What a run consists of; `build.py` makes it from a config."""

    seed: int
    steps: int
    mesh: Mesh
    rules: Any  # parameter names -> layouts
    init: Callable[[jax.Array], Params]
    loss: Loss
    optimizer: optax.GradientTransformation
    frozen: Params
    batches: Callable[[int], Iterator[dict[str, np.ndarray]]]  # from a step on
    evaluate: Callable[[Params, int], Evaluation]  # (moving average, step)
    ema: float
    accumulate: int
    log_every: int
    eval_every: int
    save_every: int
    keep: int
    max_skipped: int


class TrainingStopped(RuntimeError):
    """The run cannot go on; what it has is saved."""


class Interrupt:
    """Notes SIGTERM and Ctrl-C, so that the loop can finish its step and save; a second signal ends at once."""

    def __init__(self):
        self.name: str | None = None

    def _note(self, number, frame):
        if self.name is not None:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name

    @contextlib.contextmanager
    def watch(self):
        before = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def start_state(run: Run, saved: checkpoints.Checkpoints):
    """The latest checkpoint, or fresh parameters born with their shardings; and those shardings."""

    def fresh(key):
        return step.init_state(run.init(key), run.optimizer)

    key = jax.random.key(run.seed)
    shapes = jax.eval_shape(fresh, key)
    layouts = sharding.state_layouts(run.mesh, run.rules, shapes)
    if saved.latest() is not None:
        return saved.restore(shapes, layouts), layouts
    return jax.jit(fresh, out_shardings=layouts)(key), layouts


def first_bad_leaf(params: Params) -> str | None:
    """The name of the first leaf that holds a NaN or an infinity."""
    for name, leaf in zip(tree.names(params), jax.tree.leaves(params), strict=True):
        if not np.isfinite(np.asarray(leaf)).all():
            return name
    return None


def _mean_of(window: list[dict[str, Any]]) -> dict[str, float]:
    """Means over the steps of a window; NaN marks a value that a step does not have (an empty time bin)."""
    fetched = jax.device_get(window)
    columns = {k: np.asarray([m[k] for m in fetched], np.float64) for k in fetched[0]}
    return {k: float(np.nanmean(v)) if np.isfinite(v).any() else np.nan for k, v in columns.items()}


def train(run: Run, workdir: str | Path) -> int:
    """Trains to `run.steps` and returns the step that was reached (less, if a signal came).

    Raises:
      TrainingStopped: more than `run.max_skipped` steps in a row were not finite.
    """
    began = time.perf_counter()
    interrupt = Interrupt()
    with interrupt.watch():
        saved = checkpoints.Checkpoints(workdir, run.keep)
        state, layouts = start_state(run, saved)
        at = int(state.step)
        log = logs.Logs(workdir, at, run.steps)
        if at:
            log.say(f"resumed at step {at} of {run.steps}")
        replicated = sharding.replicated(run.mesh)
        train_step = jax.jit(
            step.make_train_step(run.loss, run.optimizer, run.ema, run.accumulate),
            donate_argnums=0,
            out_shardings=(layouts, replicated),
        )
        key = jax.device_put(jax.random.key(run.seed + 1), replicated)
        count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        log.say(f"{count:,} parameters on {run.mesh.devices.size} device(s)")
        window, waited, since, compiled = [], 0.0, time.perf_counter(), None
        batches = run.batches(at)
        try:
            while at < run.steps and interrupt.name is None:
                asked = time.perf_counter()
                batch = sharding.place(run.mesh, next(batches))
                waited += time.perf_counter() - asked
                state, metrics = train_step(state, run.frozen, batch, key)
                at += 1
                window.append(metrics)
                log.advance()
                if compiled is None:
                    jax.block_until_ready(metrics)
                    compiled = time.perf_counter()
                    log.say(f"first step after {compiled - began:.1f} s")
                    since, waited, timed = compiled, 0.0, at
                if at % run.log_every == 0 or at == run.steps:
                    values = _mean_of(window)
                    seconds = time.perf_counter() - since
                    if at > timed:
                        values["steps_per_second"] = (at - timed) / seconds
                        values["waiting_for_data"] = waited / seconds
                    log.scalars(at, values)
                    in_a_row = int(state.skipped)
                    if in_a_row:
                        log.say(
                            f"step {at}: {in_a_row} step(s) in a row were not finite and were skipped"
                        )
                    if in_a_row >= run.max_skipped:
                        raise TrainingStopped(_why(run, state, batch, in_a_row))
                    window, waited, timed, since = [], 0.0, at, time.perf_counter()
                if at % run.eval_every == 0 or at == run.steps:
                    evaluation = run.evaluate(state.ema, at)
                    log.scalars(at, evaluation.scalars)
                    for name, image in evaluation.images.items():
                        log.image(at, name, image)
                    shown = ", ".join(f"{k} {v:.4g}" for k, v in evaluation.scalars.items())
                    log.say(f"step {at}: {shown}")
                    since, waited, timed = time.perf_counter(), 0.0, at
                if at % run.save_every == 0:
                    saved.save(state)
        finally:
            # Also after an error: the state is the last one that a finished step returned.
            saved.save(state)
            durable = saved.wait()
            if interrupt.name is not None:
                log.say(
                    f"{interrupt.name}: step {durable} is saved; the same command goes on from there"
                )
            log.close()
            saved.close()
    logging.info("ended at step %d", at)
    return at


def _why(run: Run, state: Any, batch: Any, in_a_row: int) -> str:
    bad = first_bad_leaf(state.params) or first_bad_leaf(batch)
    where = f"the first bad leaf is {bad!r}" if bad else "parameters and batch are finite"
    return (
        f"{in_a_row} steps in a row were not finite (allowed: {run.max_skipped}); {where}. Parameters, optimizer and EMA "
        "are those of the last good step; lower the learning rate, clip gradients, or look at the data"
    )
