"""The loop of every run: restore or initialise, step, log, evaluate, save; a signal saves and ends it.

The device is kept busy: a step is handed over while the one before runs, and numbers are fetched only when a line of
the log is due.
"""

import contextlib
import functools
import signal
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jax.sharding import Mesh

from ldm_jax import tree
from ldm_jax.training import (
    checkpoints,
    compiled,
    goodput,
    guards,
    logs,
    processes,
    profile,
    sharding,
    speed,
    step,
)
from ldm_jax.training.guards import Guards, TrainingStopped
from ldm_jax.types import Loss, Params, TrainState

NOT_TO_SAVE = (jax.errors.JaxRuntimeError, guards.Diverged, checkpoints.Unreadable)
AHEAD = 2  # steps handed to the device before the oldest of them is waited for: each holds a batch


class Evaluation(NamedTuple):
    scalars: dict[str, float]
    images: dict[str, np.ndarray]


class Run(NamedTuple):
    """What a run consists of; `build` makes it from a config."""

    seed: int
    steps: int
    mesh: Mesh
    rules: Any  # parameter names -> layouts
    init: Callable[[jax.Array], Params]
    loss: Loss
    optimizer: optax.GradientTransformation
    frozen: Params
    batches: Callable[[int], Generator[dict[str, np.ndarray]]]  # from a step on
    evaluate: Callable[[Params, Params], Evaluation]  # (moving average, frozen)
    ema: float
    accumulate: int
    log_every: int
    eval_every: int
    save_every: int
    keep: int | checkpoints.Keep
    max_skipped: int
    # Parameters to start from, born with these layouts; `init` then says their shapes alone.
    load: Callable[[Any], Params] | None = None
    kept: compiled.Kept | None = None  # the compiled step of an earlier start
    guards: Guards = Guards()
    batch: int = 1  # samples of a step
    operations: Callable[[], int] | None = None  # counts those of a step
    wandb: str = ""  # a project of Weights & Biases


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
        handlers = processes.handlers(self._note)
        before = {s: signal.signal(s, handler) for s, handler in handlers.items()}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def came(self, step: int) -> bool:
        """Whether to stop at this step; the same on all processes, whichever of them was told."""
        if self.name is None and processes.stop_here(step):
            self.name = signal.SIGTERM.name
        return self.name is not None


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


def start_state(run: Run, saved: checkpoints.Checkpoints) -> tuple[TrainState, Any]:
    """The latest checkpoint, or fresh or pretrained parameters born with their shardings; and those shardings."""

    def fresh(key):
        return step.init_state(run.init(key), run.optimizer)

    key = jax.random.key(run.seed)
    shapes = jax.eval_shape(fresh, key)
    layouts = sharding.state_layouts(run.mesh, run.rules, shapes)
    if saved.begun():
        return saved.restore(shapes, layouts), layouts
    if run.load is not None:
        begin = jax.jit(
            lambda params: step.init_state(params, run.optimizer),
            donate_argnums=0,
            out_shardings=layouts,
        )
        return begin(run.load(layouts.params)), layouts
    return jax.jit(fresh, out_shardings=layouts)(key), layouts


def first_bad_leaf(arrays: Params) -> str | None:
    """The name of the first leaf that holds a NaN or an infinity."""
    for name, leaf in zip(tree.names(arrays), jax.tree.leaves(arrays), strict=True):
        if not bool(jnp.isfinite(leaf).all()):
            return name
    return None


def train(
    run: Run, workdir: str | Path, began: float | None = None, traced: range = range(0)
) -> int:
    """Trains to `run.steps` and returns the step that was reached (less, if a signal came).

    `began` is when the process did, by `time.perf_counter`; the steps in `traced` are traced into `workdir/profile`.

    Raises:
      TrainingStopped: `run.max_skipped` steps in a row were not finite, or the data cannot be read.
      checkpoints.Unreadable: there are checkpoints, and none can be restored.
      checkpoints.SaveFailed: the last state could not be saved.
    """
    began = time.perf_counter() if began is None else began
    with contextlib.ExitStack() as stack:
        interrupt = stack.enter_context(Interrupt().watch())
        scores: dict[int, float] = {}
        saved = checkpoints.Checkpoints(workdir, run.keep, scores)
        stack.enter_context(contextlib.closing(saved))
        state, layouts = start_state(run, saved)
        at = int(state.step)
        course = guards.Course(run.guards, Path(workdir) / logs.FILE, at, scores)
        writer = logs.Logs if processes.first() else logs.Silent
        log = writer(workdir, at, run.steps, project=run.wandb)
        stack.enter_context(contextlib.closing(log))
        _check_agreement(state)
        _greet(run, state, log, course)
        clock = goodput.Clock(workdir, at, began)
        rate = speed.Speed(run.batch, run.mesh, run.operations)
        tracing = profile.Profile(Path(workdir) / "profile", traced)
        stack.enter_context(contextlib.closing(tracing))
        replicated = sharding.replicated(run.mesh)
        one = step.make_train_step(run.loss, run.optimizer, run.ema, run.accumulate)
        make_step = functools.partial(
            compiled.finish, run.kept, sharding.on(run.mesh, one), (layouts, replicated)
        )
        train_step = None
        key = jax.jit(lambda: jax.random.key(run.seed + 1), out_shardings=replicated)()
        window, first, stepping = Window(), at + 1, False
        batches = stack.enter_context(contextlib.closing(run.batches(at)))
        watchdog = stack.enter_context(guards.Watchdog(run.guards.hang).on_duty())
        try:
            while at < run.steps and not interrupt.came(at) and not course.over():
                if at >= first:  # the first step compiles
                    watchdog.watch()
                with clock.of("data"):
                    rows = window.next_of(batches)
                batch = sharding.place(run.mesh, rows)
                stepping = True
                if train_step is None:
                    clock.turn("compile")
                    train_step = make_step((state, run.frozen, batch, key))
                with tracing.step(at + 1):
                    state, metrics = train_step(state, run.frozen, batch, key)
                    window.add(metrics)
                stepping = False
                at += 1
                log.advance()
                if tracing.after(at, metrics):
                    log.say(f"traced the steps up to {at}: {tracing.folder}")
                if at == first:
                    window.restart_clock()
                    clock.turn("train")
                    log.say(f"first step after {time.perf_counter() - began:.1f} s")
                if at % run.log_every == 0 or at == run.steps:
                    values = window.close()
                    values |= rate.of(values.get("steps_per_second")) | clock.shares()
                    log.scalars(at, values)
                    clock.write(at)
                    watchdog.rest()
                    state = _guard(run, state, batch, values["loss"], saved, course, log)
                if at % run.eval_every == 0 or at == run.steps:
                    watchdog.rest()
                    with clock.of("evaluate"):
                        course.score(at, _evaluate(run, state, at, log))
                    window.restart_clock()
                if at % run.save_every == 0:
                    with clock.of("save"):
                        saved.save(state)
                    clock.write(at)
                _tell_saved(saved, log)
        except Exception as error:
            watchdog.rest()
            alone = not processes.several()  # others would not come to save with this one
            if alone and not stepping and not isinstance(error, NOT_TO_SAVE):
                _rescue(saved, state, log)
            raise
        watchdog.rest()
        with clock.of("save"):
            saved.save(state)
            durable = saved.wait()
        _tell_saved(saved, log)
        clock.write(at)
        log.say(clock.told())
        if course.over():
            log.say(f"stopped early at step {at}: {course.over()}")
        if interrupt.name is not None:
            log.say(
                f"{interrupt.name}: step {durable} is saved; the same command goes on from there"
            )
    return at


def _check_agreement(state: TrainState) -> None:
    """Raises: TrainingStopped: the processes do not start from the same parameters."""
    try:
        processes.agree_on_arrays("the parameter", state.params)
    except ValueError as error:
        raise TrainingStopped(str(error)) from error


def _greet(run: Run, state: TrainState, log: logs.Logs, course: guards.Course) -> None:
    at = int(state.step)
    if at:
        rest = "" if at < run.steps and not course.over() else "; nothing is left to do"
        log.say(f"resumed at step {at} of {run.steps}{rest}")
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    devices = run.mesh.devices
    shape = " x ".join(f"{k} {v}" for k, v in run.mesh.shape.items() if v > 1)
    kind = f"{devices.size} {devices.flat[0].device_kind} device(s)"
    among = f" of {jax.process_count()} processes" if processes.several() else ""
    log.say(f"{count:,} parameters on {kind}{among}{f': {shape}' if shape else ''}")


def _evaluate(run: Run, state: TrainState, at: int, log: logs.Logs) -> dict[str, float]:
    evaluation = run.evaluate(state.ema, run.frozen)
    log.scalars(at, evaluation.scalars)
    for name, image in evaluation.images.items():
        log.image(at, name, image)
    log.say(f"step {at}: " + ", ".join(f"{k} {v:.4g}" for k, v in evaluation.scalars.items()))
    return evaluation.scalars


def _guard(
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


def _tell_saved(saved: checkpoints.Checkpoints, log: logs.Logs) -> None:
    for durable in saved.news():
        log.say(f"saved step {durable}")
    for trouble in saved.trouble():
        log.say(f"{trouble}; training goes on, older steps stay, and the next save is tried")


def _rescue(saved: checkpoints.Checkpoints, state: TrainState, log: logs.Logs) -> None:
    """After an error outside of a step: saves the state; never hides the error by one of its own.

    Not after an error of the device: then the state is that of a step which failed, its arrays may be gone, and waiting
    for them may never end. The last checkpoint has to do.
    """
    try:
        saved.save(state)
        saved.wait()
        _tell_saved(saved, log)
    except Exception as error:
        logging.error("the state could not be saved: %s", error)
