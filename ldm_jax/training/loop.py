"""The loop of every run: restore or initialise, step, log, evaluate, save; a signal saves and ends it.

The device is kept busy: a step is handed over while the one before runs, and numbers are fetched only when a line of
the log is due.
"""

import contextlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from absl import logging

from ldm_jax.training import (
    averages,
    checkpoints,
    compiled,
    goodput,
    guards,
    joined,
    logs,
    processes,
    profile,
    reading,
    recovery,
    sharding,
    speed,
    start,
    step,
)
from ldm_jax.training.guards import TrainingStopped
from ldm_jax.training.interrupt import Interrupt
from ldm_jax.training.run import Evaluation, Periodic, Run
from ldm_jax.training.start import start_state
from ldm_jax.training.window import Window

__all__ = ["Evaluation", "Periodic", "Run", "TrainingStopped", "start_state", "train"]

NOT_TO_SAVE = (jax.errors.JaxRuntimeError, guards.Diverged, checkpoints.Unreadable)
OWED = "evaluation_owed"  # a line of the log: a signal came before the evaluation of this step was done


def train(
    run: Run, workdir: str | Path, began: float | None = None, traced: range = range(0)
) -> int:
    """Trains to `run.steps` and returns the step that was reached (less, if a signal came).

    `began` is when the process did, by `time.perf_counter`; the steps in `traced` are traced into `workdir/profile`.
    A signal during the first compile or an evaluation ends the process from within (see `interrupt`).

    Raises:
      TrainingStopped: `run.max_skipped` steps in a row were not finite, or the data cannot be read.
      checkpoints.Unreadable: there are checkpoints, and none can be restored.
      checkpoints.SaveFailed: the last state could not be saved.
    """
    began = time.perf_counter() if began is None else began
    with Interrupt().watch() as signals, contextlib.ExitStack() as stack:
        with signals.beginning():
            of = _Training(run, Path(workdir), began, traced, signals, stack)
        with of.rescue():
            if of.owed:
                of.evaluate()
            while of.at < run.steps and not signals.came(of.at) and not of.course.over():
                of.step()
                last = of.at == run.steps
                if of.at % run.log_every == 0 or last:
                    of.tell()
                of.evaluate()
                if of.at % run.save_every == 0:
                    of.save()
                of.tell_saved()
        of.end()
    return of.at


class _Training:
    """A run under way: its state, and what it is fed, told, watched and kept by; `stack` closes these."""

    def __init__(
        self,
        run: Run,
        workdir: Path,
        began: float,
        traced: range,
        signals: Interrupt,
        stack: contextlib.ExitStack,
    ):
        def closed(thing):
            return stack.enter_context(contextlib.closing(thing))

        self.run, self.began, self.signals, self.stack = run, began, signals, stack
        scores: dict[int, float] = {}
        self.saved = closed(checkpoints.Checkpoints(workdir, run.keep, scores))
        self.state, self.layouts = start_state(run, self.saved)
        self.at = int(self.state.step)
        path = workdir / logs.FILE
        self.course = guards.Course(run.guards, path, self.at, scores)
        self.owed = logs.ends_with(path, self.at, OWED)
        writer = logs.Logs if processes.first() else logs.Silent
        self.log = closed(writer(workdir, self.at, run.steps, project=run.wandb))
        start.check_agreement(self.state)
        start.greet(run, self.state, self.log, bool(self.course.over()))
        self.clock = goodput.Clock(workdir, self.at, began)
        self.rate = speed.Speed(run.batch, run.mesh, run.operations)
        self.tracing = closed(profile.Profile(workdir / "profile", traced))
        replicated = sharding.replicated(run.mesh)
        self.key = jax.jit(lambda: jax.random.key(run.seed + 1), out_shardings=replicated)()
        self.window = Window()
        self.batches = closed(run.batches(self.at))
        self.watchdog = stack.enter_context(guards.Watchdog(run.guards.hang).on_duty())
        self.batch: Any = None
        self.taken: dict[tuple[int, ...], compiled.Call] = {}  # compiled steps by the data's shape
        self.stepping = False

    def step(self) -> None:
        """One step; the first one is compiled before."""
        if first := not self.taken:
            with self.signals.beginning(last=True):
                self._feed()
                self.clock.turn("compile")
                self._compile()
        else:
            self.watchdog.watch()
            self._feed()
        with self.tracing.step(self.at + 1):
            take = self.taken[self.batch["x"].shape]
            self.state, metrics = take(self.state, self.run.frozen, self.batch, self.key)
            self.window.add(metrics)
        self.stepping = False
        self.at += 1
        self.log.advance()
        if self.tracing.after(self.at, metrics):
            self.log.say(f"traced the steps up to {self.at}: {self.tracing.folder}")
        if first:
            self.window.restart_clock()
            self.clock.turn("train")
            self.log.say(f"first step after {time.perf_counter() - self.began:.1f} s")

    def _feed(self) -> None:
        with self.clock.of("data"):
            rows = self.window.next_of(self.batches)
        self.batch = sharding.place(self.run.mesh, rows)
        self.stepping = True

    def _compile(self) -> None:
        """The step for batches like this one, and for those of all other shapes that the data has."""
        run, layouts = self.run, (self.layouts, sharding.replicated(self.run.mesh))
        how = (run.ema, run.accumulate, run.groups)
        taken = sharding.on(run.mesh, step.make_train_step(run.loss, run.optimizer, *how))
        options = joined.options(list(run.mesh.devices.flat), self.state.params)
        others = [reading.abstract(b, sharding.batch_layouts(run.mesh, b)) for b in run.shapes]
        for batch in (self.batch, *others):
            if (shape := batch["x"].shape) not in self.taken:
                inputs = (self.state, run.frozen, batch, self.key)
                self.taken[shape] = compiled.finish(run.kept, taken, layouts, inputs, options)

    def tell(self) -> None:
        """A line of the log; after too much trouble the state is another one."""
        values = self.window.close()
        values |= self.rate.of(values.get("steps_per_second")) | self.clock.shares()
        self.log.scalars(self.at, values)
        self.clock.write(self.at)
        self.watchdog.rest()
        self.state = recovery.state_after(
            self.run, self.state, self.batch, values["loss"], self.saved, self.course, self.log
        )

    def evaluate(self) -> None:
        """Measures and draws what is due at this step; a signal does not wait for that, but saves.

        Several processes can save only together, so they do it before.
        """
        known = [Periodic(self.run.eval_every, self.run.evaluate)]
        known += [self.run.judged] if self.run.judged else []
        last = self.at == self.run.steps
        due = [of.evaluate for of in known if last or self.at % of.every == 0]
        if not due:
            return
        self.watchdog.rest()
        if processes.several():
            self.save()
            interruptible = self.signals.together(f"evaluate/{self.at}", self._leave_together)
        else:
            interruptible = self.signals.leaving(self._leave_evaluation)
        with self.clock.of("evaluate"):
            with interruptible:
                average = averages.first(self.run.ema, self.state.ema)
                found = [evaluate(average, self.run.frozen) for evaluate in due]
            scalars = {k: v for of in found for k, v in of.scalars.items()}
            self.log.scalars(self.at, scalars)
            for name, image in [pair for of in found for pair in of.images.items()]:
                self.log.image(self.at, name, image)
            told = ", ".join(f"{k} {v:.4g}" for k, v in scalars.items())
            self.log.say(f"step {self.at}: {told}")
            self.course.score(self.at, scalars, whole=len(due) == len(known))
        self.window.restart_clock()

    def _leave_evaluation(self) -> None:
        self.log.scalars(self.at, {OWED: 1.0})
        self.end()
        self.stack.close()

    def _leave_together(self) -> None:
        """Of several processes: what was given to be saved is waited for."""
        self.log.scalars(self.at, {OWED: 1.0})
        self._ended(self.saved.wait(), signal.SIGTERM.name)
        self.log.close()

    def save(self) -> None:
        with self.clock.of("save"):
            self.saved.save(self.state)
        self.clock.write(self.at)

    def tell_saved(self) -> None:
        for durable in self.saved.news():
            self.log.say(f"saved step {durable}")
        for trouble in self.saved.trouble():
            self.log.say(
                f"{trouble}; training goes on, older steps stay, and the next save is tried"
            )

    @contextlib.contextmanager
    def rescue(self) -> Iterator[None]:
        """After an error outside of a step saves the state; never hides the error by one of its own.

        Not after an error of the device: then the state is that of a step which failed, its arrays may be gone, and
        waiting for them may never end. The last checkpoint has to do. Nor with several processes, since the others
        would not come to save with this one.
        """
        try:
            yield
        except Exception as error:
            self.watchdog.rest()
            if processes.several() or self.stepping or isinstance(error, NOT_TO_SAVE):
                raise
            try:
                self.saved.save(self.state)
                self.saved.wait()
                self.tell_saved()
            except Exception as another:
                logging.error("the state could not be saved: %s", another)
            raise

    def end(self) -> None:
        """Saves the last state, and tells what the run has come to.

        Raises:
          checkpoints.SaveFailed: it is not on the disk.
        """
        self.watchdog.rest()
        with self.clock.of("save"):
            self.saved.save(self.state)
            durable = self.saved.wait()
        self._ended(durable, self.signals.name)

    def _ended(self, durable: int | None, name: str | None) -> None:
        self.tell_saved()
        self.clock.write(self.at)
        self.log.say(self.clock.told())
        if over := self.course.over():
            self.log.say(f"stopped early at step {self.at}: {over}")
        if name:
            self.log.say(f"{name}: step {durable} is saved; the same command goes on from there")
