"""Signals to real processes, in the midst of native code that never returns: a compile, an evaluation, a step."""

import json

import pytest

from ldm_jax.training import loop
from tests import tiny
from tests.test_loop import linear_run, on_devices, restored
from tests.tiny import assert_equal, losses, metrics

# One process imports everything and forks the others; JAX starts in these.
RUNS = """
import ctypes, json, os, signal, sys, time
from pathlib import Path
import pytest
from ldm_jax import build
from ldm_jax.training import evaluation, interrupt, loop

workdir = Path(sys.argv[1])

def hang(at, libc=ctypes.CDLL(None)):
    # Locks a mutex twice: no signal ends that, and Python's handlers wait for it.
    (workdir / at).touch()
    mutex = ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)

def changed(where):
    from tests.test_loop import linear_loss

    def loss(params, frozen, batch, rng, at):
        hang(where)
        return linear_loss(params, frozen, batch, rng, at)

    def evaluate(params, frozen):
        hang(where)

    def batch(at, x):
        if at == 2:
            hang(where)
        return x

    if where == "compile":
        return {"loss": loss}
    if where == "evaluate":
        return {"evaluate": evaluate}
    return {"spoil": batch}

def start(where):
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.dup2(os.open(workdir / f"{where}.err", os.O_WRONLY | os.O_CREAT), 2)
            from tests.test_loop import linear_run, on_devices  # which starts JAX

            run = linear_run(**changed(where), save_every=100, **on_devices(1))
            loop.train(run, workdir / f"{where}_run")
        except BaseException as error:
            print(repr(error), file=sys.stderr)
        finally:
            os._exit(status)
    return child

def until(true):
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)

told, children = {}, {where: start(where) for where in ("compile", "evaluate", "step")}
for where, child in children.items():
    until((workdir / where).exists)
    began = time.monotonic()
    os.kill(child, signal.SIGTERM)
    if where == "step":  # which has to be finished
        time.sleep(0.5)
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        os.kill(child, signal.SIGINT)
    ended = (0, 0)
    while ended == (0, 0) and time.monotonic() < began + 60:
        time.sleep(0.01)
        ended = os.waitpid(child, os.WNOHANG)
    if ended == (0, 0):
        os.kill(child, signal.SIGKILL)
        ended = os.waitpid(child, 0)
    status = os.waitstatus_to_exitcode(ended[1])
    told[where] = [status, time.monotonic() - began, (workdir / f"{where}.err").read_text()]
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """The folder of three runs that were hanging when a signal came; status, seconds and what they told."""
    folder = tmp_path_factory.mktemp("ended")
    done = tiny.spawn("-c", RUNS, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, json.loads(done.stdout)


def test_during_the_first_compile_nothing_is_to_be_saved(ended):
    folder, told = ended
    status, seconds, words = told["compile"]
    assert status == 0, words
    assert seconds < 10
    assert "nothing is new that could be saved" in words
    assert not [p for p in (folder / "compile_run/checkpoints").iterdir() if p.name.isdigit()]


def test_during_an_evaluation_the_step_is_saved_and_the_evaluation_is_owed(ended, tmp_path):
    folder, told = ended
    status, seconds, words = told["evaluate"]
    assert status == 0, words
    assert seconds < 10
    assert "SIGTERM: step 4 is saved; the same command goes on from there" in words
    run, workdir = linear_run(**on_devices(1)), folder / "evaluate_run"
    assert loop.train(run, workdir) == 8
    loop.train(run, tmp_path)
    assert_equal(restored(run, workdir), restored(run, tmp_path))
    assert losses(workdir) == losses(tmp_path)
    ours, theirs = (
        [(m["step"], m["validation/w"]) for m in metrics(w) if "validation/w" in m]
        for w in (workdir, tmp_path)
    )
    assert ours == theirs
    assert [m["step"] for m in metrics(workdir) if loop.OWED in m] == [4]


def test_a_second_signal_ends_at_once(ended):
    folder, told = ended
    status, seconds, words = told["step"]
    assert status == 128 + 2, words
    assert seconds < 10
    assert not [p for p in (folder / "step_run/checkpoints").iterdir() if p.name.isdigit()]
