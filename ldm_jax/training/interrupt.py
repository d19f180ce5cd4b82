"""SIGTERM and Ctrl-C: noted, so that the loop finishes its step and saves; a second one ends the process at once.

Python runs its handlers between two of its own instructions, not before a compile or an evaluation of many minutes
returns from XLA. So a thread is told as well, at once, through the pipe into which the system's handler writes
(`signal.set_wakeup_fd`). Where the main thread is at work that changes nothing (`leaving`), that thread sees to what is
left to do and ends the process in the midst of it.

With several processes the one that hears a signal tells all of them; what they save they save together, so each goes
on until the step that they agreed on. Before the first step there is nothing to save, and before an evaluation the loop
has begun to save: then a thread of each hears of it, and they leave together in the midst of it, unless all of them
were done (`together`).
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator

from ldm_jax.training import processes

FAILED = 2  # the exit status of a command that ends with an error
LISTEN = 0.25  # seconds, after which a thread looks whether it is still to listen
BY_SIGNAL = 128  # what a shell adds to a signal's number


class Interrupt:
    """`name` is that of the signal which came, or None."""

    def __init__(self):
        self.name: str | None = None
        self._end: Callable[[], None] | None = None
        self._lock = threading.Lock()  # held while the process ends

    @contextlib.contextmanager
    def watch(self) -> Iterator["Interrupt"]:
        """Signals are heard within; to be called by the main thread."""
        handlers = processes.handlers(self._note)
        heard, told = os.pipe()
        os.set_blocking(told, False)
        pipe = signal.set_wakeup_fd(told)
        before = {number: signal.signal(number, f) for number, f in handlers.items()}
        listener = threading.Thread(target=self._listen, args=(heard, handlers), daemon=True)
        listener.start()
        try:
            yield self
        finally:
            for number, handler in before.items():
                if handler is not None:  # jax's own, of which Python does not know
                    signal.signal(number, handler)
            signal.set_wakeup_fd(pipe)
            os.write(told, bytes(1))  # no signal has the number 0
            listener.join()
            os.close(heard)
            os.close(told)

    def came(self, step: int) -> bool:
        """Whether to stop at this step; the same on all processes, whichever of them was told."""
        if self.name is None and processes.stop_here(step):
            self.name = signal.SIGTERM.name
        return self.name is not None

    @contextlib.contextmanager
    def leaving(self, end: Callable[[], None]) -> Iterator[None]:
        """Within, a signal makes a thread call `end()` and end the process, with status 0 unless that raises.

        What the caller does meanwhile must be as good as not done. Of one process alone; of several see `together`.
        """
        self._may(end)
        if self.name is not None:  # it came just before
            self._leave()
        try:
            yield
        finally:
            self._may(None)

    @contextlib.contextmanager
    def together(self, what: str, end: Callable[[], None], last: bool = True) -> Iterator[None]:
        """`leaving` in the midst of `what` with several processes, which leave together or go on together.

        After the block that is `last` of those with the same `what` none of them leaves any more.
        """
        over = threading.Event()
        given = (what, end, over)
        listener = threading.Thread(target=self._listen_to_others, args=given, daemon=True)
        listener.start()
        try:
            yield
            if last and not processes.go_on_together(what):
                listener.join()  # it ends the process
        finally:
            # Not while jax parts from the others does it ask them. And what was done may have failed because they
            # leave: then that is no error, and this ends the process.
            over.set()
            listener.join()

    def beginning(self, last: bool = False) -> contextlib.AbstractContextManager[None]:
        """`leaving` or `together` before the first step, when nothing is new that could be saved."""
        if processes.several():
            return self.together("begin", nothing_new, last)
        return self.leaving(nothing_new)

    def _listen_to_others(self, what: str, end: Callable[[], None], over: threading.Event) -> None:
        while not over.is_set():
            if processes.noticed(LISTEN):
                self._may(end)
                self._leave(lambda: processes.leave(what))
                return

    def _may(self, end: Callable[[], None] | None) -> None:
        with self._lock:
            self._end = end

    def _leave(self, agreed: Callable[[], bool] = lambda: True) -> None:
        with self._lock:
            if self._end is None:
                return
            status, ends = 0, True
            try:
                try:
                    if ends := agreed():
                        self._end()
                        processes.part()
                except Exception as error:  # whatever it is, the process ends
                    status = FAILED
                    print(f"error: {error}", file=sys.stderr)
                sys.stdout.flush()
                sys.stderr.flush()
            finally:  # where nobody reads what is printed, too
                if ends:
                    _exit(status)

    def _note(self, number: int, frame: object) -> None:
        self.name = signal.Signals(number).name

    def _listen(self, heard: int, watched: Collection[int]) -> None:
        came = 0
        while number := os.read(heard, 1)[0]:
            if number not in watched:
                continue
            came += 1
            if came > 1:
                _exit(BY_SIGNAL + number)
            if processes.several():
                processes.tell()
            else:
                self._note(number, None)
                threading.Thread(target=self._leave, daemon=True).start()


def nothing_new() -> None:
    """What is left to do before the first step of a process is done."""
    print(
        "a signal came before the first step was done: nothing is new that could be saved, and the same command "
        "starts again",
        file=sys.stderr,
    )


def _exit(status: int) -> None:
    """Without what Python does at its end, which waits for threads; data workers end, too."""
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(status)
