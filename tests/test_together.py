"""Two real processes in trouble: killed, told to stop in the midst of an evaluation, told so twice, hanging."""

import json
import signal

import pytest

from tests import tiny
from tests.tiny import losses, metrics

pytestmark = pytest.mark.slow

# One process imports everything and forks the others, two at a time; JAX starts in these.
RUNS = """
import ctypes, json, os, random, signal, socket, sys, time
from pathlib import Path
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ldm_jax import build
from ldm_jax.models import autoencoder
from ldm_jax.training import checkpoints, evaluation, guards, logs, loop, processes, sharding

STEPS, KILLS = 30, 4
folder, random = Path(sys.argv[1]), random.Random(0)

def hang(at, only, libc=ctypes.CDLL(None)):
    # Locks a mutex twice: no signal ends that, and Python's handlers wait for it.
    (folder / f"{at}_{jax.process_index()}").touch()
    if jax.process_index() in only:
        mutex = ctypes.create_string_buffer(64)
        libc.pthread_mutex_lock(mutex)
        libc.pthread_mutex_lock(mutex)

def run_of(steps=8, evaluating=None, stepping=None, every=100, **changes):
    from tests.test_loop import linear_loss, linear_run

    def loss(params, frozen, batch, rng, at):
        value, aside = linear_loss(params, frozen, batch, rng, at)
        return value + jnp.mean(params["net"]["w"] * jax.random.normal(rng, (3,))), aside

    def evaluate(params, frozen):
        if evaluating:
            hang(*evaluating)
            return loop.Evaluation({}, {})
        w = float(processes.fetch(params["net"]["w"])[0])
        return loop.Evaluation({"validation/w": w}, {})

    run = linear_run(steps=steps, loss=loss, evaluate=evaluate, eval_every=every, **changes)
    index, count = sharding.share(run.mesh)

    def batches(start):
        for at, batch in enumerate(run.batches(start), start):
            if stepping and at == 2:
                hang(*stepping)
            time.sleep(0.02)  # else all of the time is spent with saving
            yield {"x": batch["x"].reshape(count, -1, 3)[index]}

    return run._replace(batches=batches)

def start(name, **changes):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [fork(name, index, port, changes) for index in range(2)]

def fork(name, index, port, changes):
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.dup2(os.open(folder / f"{name}.{index}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        jax.config.update("jax_num_cpu_devices", 2)
        processes.meet(False, f"localhost:{port}", index, 2)
        run = run_of(**changes)
        loop.train(run, folder / name)
        status = 0
    except BaseException as error:
        print(repr(error), file=sys.stderr)
    finally:
        os._exit(status)

def until(true, seconds=300):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)

def ended(name, children, began=None):
    # The exit statuses, how long it took and what both told.
    began, statuses = time.monotonic() if began is None else began, {}

    def over():
        for child in set(children) - statuses.keys():
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                statuses[child] = os.waitstatus_to_exitcode(status)
        return len(statuses) == 2

    try:
        until(over)
    finally:
        for child in set(children) - statuses.keys():
            os.kill(child, signal.SIGKILL)
    words = [(folder / f"{name}.{index}").read_text() for index in range(2)]
    return [statuses[c] for c in children], time.monotonic() - began, words

def signalled(name, at, told, number=signal.SIGTERM, **changes):
    children = start(name, **changes)
    until(lambda: len(list(folder.glob(f"{at}_*"))) == 2)
    began = time.monotonic()
    for index in told:
        os.kill(children[index], number)
    return children, began

def lines(name):
    path = folder / name / logs.FILE
    return path.read_text().count("\\n") if path.is_file() else 0

results = {}

# Left alone, and killed.
results["whole"] = ended("whole", start("whole", steps=STEPS))
for target in sorted(random.sample(range(2, STEPS - 2), KILLS)):
    children = start("killed", steps=STEPS)
    until(lambda: lines("killed") >= target)
    for child in children:
        os.kill(child, signal.SIGKILL)
    results[f"killed at {target}"] = ended("killed", children)
results["killed"] = ended("killed", start("killed", steps=STEPS))

# A signal to one, in the midst of an evaluation: of both, and of one for which the other waits.
for name, only, told in (("both", (0, 1), 1), ("one", (1,), 0)):
    given = dict(every=3, save_every=100)
    children, began = signalled(name, name, [told], evaluating=(name, only), **given)
    results[name] = ended(name, children, began)
    results[f"{name} again"] = ended(name, start(name, **given))
given = dict(steps=8, every=3, save_every=100)
results["unhurt"] = ended("unhurt", start("unhurt", **given))

# A signal to one, while both take steps.
children = start("step", steps=100_000, every=100_000, save_every=100_000)
until(lambda: lines("step") >= 3)
began = time.monotonic()
os.kill(children[1], signal.SIGTERM)
results["step"] = ended("step", children, began)

# A second signal to both, in the midst of a step.
children, _ = signalled("twice", "slow", [0, 1], stepping=("slow", (0, 1)))
time.sleep(3)  # the step is to be finished
assert [os.waitpid(child, os.WNOHANG) for child in children] == [(0, 0)] * 2
began = time.monotonic()
for child, number in zip(children, (signal.SIGTERM, signal.SIGINT)):
    os.kill(child, number)
results["twice"] = ended("twice", children, began)

# One hangs, and the other one waits for it.
watched = guards.Guards(hang=10.0)
results["hanging"] = ended("hanging", start("hanging", stepping=("hanging", (1,)), guards=watched))
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """The folder of all runs; of each what became of it: (exit statuses, seconds, what the processes told)."""
    folder = tmp_path_factory.mktemp("together")
    done = tiny.spawn("-c", RUNS, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, json.loads(done.stdout.splitlines()[-1])  # gloo prints before


def saved(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


def arrays(workdir):
    """The newest checkpoint's, by their names."""
    from ldm_jax.training import reading

    found = {}
    for item in ("state", "ema"):
        folder, step = reading.sound_step(workdir, None, item)
        found |= {f"{item}/{k}": v for k, v in reading.arrays(folder / str(step) / item).items()}
    return found


def test_two_that_are_killed_go_on_to_the_same_bits(told):
    folder, results = told
    for name in ("whole", "killed"):
        assert results[name][0] == [0, 0], results[name]
    killed = [name for name in results if name.startswith("killed at")]
    assert len(killed) == 4
    for name in killed:
        assert results[name][0] == [-signal.SIGKILL] * 2, results[name]
    assert "resumed at step" in results["killed"][2][0]
    assert [line["step"] for line in losses(folder / "killed")] == list(range(1, 31))
    assert losses(folder / "killed") == losses(folder / "whole")
    a, b = (arrays(folder / name) for name in ("killed", "whole"))
    assert a.keys() == b.keys()
    assert len(a) > 6
    for name, value in a.items():
        assert value.tobytes() == b[name].tobytes(), name


def test_a_signal_to_one_stops_both_at_the_same_step(told):
    folder, results = told
    status, seconds, words = results["step"]
    assert status == [0, 0], words
    assert seconds < 20
    (step,) = saved(folder / "step")
    assert f"SIGTERM: step {step} is saved" in words[0]
    assert losses(folder / "step")[-1]["step"] == step


@pytest.mark.parametrize("name", ["both", "one"])
def test_a_signal_during_an_evaluation_ends_both_with_the_step_saved(name, told):
    folder, results = told
    status, seconds, words = results[name]
    assert status == [0, 0], words
    assert seconds < 20
    assert "SIGTERM: step 3 is saved; the same command goes on from there" in words[0]
    # The evaluation is owed, and then all is as if nothing had been.
    status, _, words = results[f"{name} again"]
    assert status == [0, 0], words
    assert "resumed at step 3" in words[0]
    found, whole = (
        [(m["step"], m["validation/w"]) for m in metrics(folder / at) if "validation/w" in m]
        for at in (name, "unhurt")
    )
    assert found == whole
    assert [step for step, _ in found] == [3, 6, 8]
    assert losses(folder / name) == losses(folder / "unhurt")


def test_a_second_signal_ends_a_process_at_once(told):
    folder, results = told
    status, seconds, words = results["twice"]
    assert status == [128 + signal.SIGTERM, 128 + signal.SIGINT], words
    assert seconds < 10
    assert saved(folder / "twice") == []


def test_when_one_hangs_both_end_with_their_stacks(told):
    """The other one waits for it, which is watched as well."""
    status, _, words = told[1]["hanging"]
    assert status == [1, 1], words
    for one in words:
        assert "Timeout (0:00:10)!" in one
        assert one.count("(most recent call first)") > 1
    assert "in hang" in words[1]
