"""A run of 200 steps that is killed 20 times, at random moments, ends with the bits of one that is left alone."""

import json
import sys

import jax
import numpy as np
import pytest

from ldm_jax import tree
from tests import tiny
from tests.test_loop import linear_run, on_devices, restored
from tests.tiny import losses

# One process imports everything, and forks a run whenever the one before was killed. JAX starts in the runs.
RUNS = """
import json, os, random, signal, sys, time
from pathlib import Path
import jax
import jax.numpy as jnp
import pytest
from ldm_jax import build
from ldm_jax.models import autoencoder
from ldm_jax.training import evaluation, logs, loop

STEPS, KILLS = 200, 20
workdir, random = Path(sys.argv[1]), random.Random(0)

def loss(params, frozen, batch, rng, at):
    from tests.test_loop import linear_loss

    value, aside = linear_loss(params, frozen, batch, rng, at)
    return value + jnp.mean(params["net"]["w"] * jax.random.normal(rng, (3,))), aside

def slow(at, x):
    time.sleep(0.02)  # else all of the time is spent with saving
    return x

def endless(at, x):
    time.sleep(0.02 if at < STEPS - 3 else 3600)  # on a fast machine too it is killed before its end
    return x

def start(folder, spoil=slow):
    child = os.fork()
    if child == 0:
        status = 1
        try:
            from tests.test_loop import linear_run, on_devices  # which starts JAX

            every = dict(save_every=5, eval_every=1000, **on_devices(2))
            run = linear_run(spoil, steps=STEPS, loss=loss, **every)
            status = 0 if loop.train(run, workdir / folder) == STEPS else 2
        except BaseException as error:
            print(repr(error), file=sys.stderr)
        finally:
            os._exit(status)
    return child

def written():
    path = workdir / "killed" / logs.FILE
    return path.read_text().count("\\n") if path.is_file() else 0

assert os.waitpid(start("whole"), 0)[1] == 0
half, early = 0, 0
for target in sorted(random.randint(1, 190) for _ in range(KILLS)):
    reached, child = written(), start("killed", endless)
    if reached >= target:  # killed while it starts, before it has come further than the one before
        early += 1
        end = time.monotonic() + random.uniform(0, 3)
        while written() <= reached and time.monotonic() < end:
            time.sleep(0.001)
    else:
        while written() < target:
            assert os.waitpid(child, os.WNOHANG) == (0, 0), "the run ended before it was killed"
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.05))
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    half += any((workdir / "killed/checkpoints").glob("*.orbax-checkpoint-tmp*"))
last = written()
assert os.waitpid(start("killed"), 0)[1] == 0
print(json.dumps({"half-written": half, "while starting": early, "last step": last}))
"""


@pytest.mark.slow
def test_a_run_that_is_killed_twenty_times_ends_with_the_same_bits(tmp_path):
    done = tiny.spawn("-c", RUNS, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    print(told, file=sys.stderr)  # docs/reliability.md has it
    assert told["half-written"] > 0  # some were killed in the middle of a save
    whole, killed = (losses(tmp_path / name) for name in ("whole", "killed"))
    assert [line["step"] for line in killed] == list(range(1, 201))
    assert killed == whole
    run = linear_run(**on_devices(2))
    a, b = (restored(run, tmp_path / name) for name in ("whole", "killed"))
    for name, x, y in zip(tree.names(a), *map(jax.tree.leaves, (a, b)), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), name
