"""Checkpoints in processes of their own: on a disk that is full, and of two processes that share a state."""

import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from ldm_jax.training import manifest, sharding
from tests import tiny
from tests.test_checkpoints import SHAPES, flipped, largest, open_, state_at

pytestmark = pytest.mark.slow

FULL = """
import resource, sys, threading, time
from tests.test_loop import linear_run, on_devices
import jax.numpy as jnp
from ldm_jax.training import checkpoints, loop

def limit(size):  # of each file, as if the disk were full; what is beyond it is refused
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

def spoil(at, x):
    limits = {5: 100_000, 9: resource.RLIM_INFINITY}
    if sys.argv[2] == "at the end":
        limits[13] = 100_000
    if at in limits:
        # Steps 4, 8 and 12 are being saved, 8 in vain.
        while any(t.name in ("async_save", "save_finalize") for t in threading.enumerate()):
            time.sleep(0.01)
        limit(limits[at])
    return x

def init(key):
    return {"net": {"w": jnp.ones(3)}, "rest": {"w": jnp.arange(1e5)}}

run = linear_run(spoil, steps=15, init=init, **on_devices(1))
try:
    loop.train(run, sys.argv[1])
except checkpoints.SaveFailed as error:
    print(error)
    sys.exit(3)
"""


@pytest.mark.parametrize("when", ["in between", "at the end"])
def test_training_goes_on_when_the_disk_is_full(when, tmp_path):
    done = tiny.spawn("-c", FULL, tmp_path, when)
    told = done.stderr
    assert "saved step 4" in told
    assert (
        "step 8 could not be saved (File too large); training goes on, older steps stay, and the next save is tried"
        in told
    )
    assert "saved step 8" not in told
    assert "saved step 12" in told
    if when == "in between":
        assert done.returncode == 0, told
        assert "saved step 15" in told
        assert manifest.steps(tmp_path / "checkpoints") == [4, 12, 15]
    else:
        assert done.returncode == 3, told
        assert "step 15 could not be saved (File too large)" in done.stdout
        assert "the last step that is saved is 12. Make room" in done.stdout
        assert manifest.steps(tmp_path / "checkpoints") == [4, 12]
    for at in manifest.steps(tmp_path / "checkpoints"):
        assert manifest.problem(tmp_path / f"checkpoints/{at}") is None


TWO = """
import sys
import jax
from tests import test_checkpoints_processes  # which makes no array

jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
test_checkpoints_processes.in_one_of_two(sys.argv[3])
"""


def in_one_of_two(workdir):
    """Saves two steps, sharded over both processes; one damages the second, both go on from the first."""
    sharding.FSDP_MIN_SIZE = 64
    mesh = sharding.make_mesh(data=2, fsdp=2)
    placed = sharding.state_layouts(mesh, ((".*", "fsdp"),), SHAPES)

    def at(n):
        return jax.jit(lambda: state_at(n), out_shardings=placed)()

    with open_(workdir) as saved:
        for n in (1, 2):
            saved.save(at(n))
            assert saved.wait() == n
            assert saved.news() == [n]
    if jax.process_index() == 0:
        flipped(lambda: largest(saved.path / "2/state"))
    multihost_utils.sync_global_devices("damaged")
    with open_(workdir) as saved:
        restored = saved.restore(SHAPES, placed)
        for a, b in zip(*map(jax.tree.leaves, (restored, at(1))), strict=True):
            assert a.sharding == b.sharding
            for x, y in zip(a.addressable_shards, b.addressable_shards, strict=True):
                np.testing.assert_array_equal(x.data, y.data)
        saved.save(at(2))
        assert saved.wait() == 2
    print("right", flush=True)


def test_two_processes_agree_on_the_step(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    argv = [[sys.executable, "-c", TWO, address, str(i), str(tmp_path)] for i in range(2)]
    own = tiny.environment() | {"JAX_NUM_CPU_DEVICES": "2"}
    kept = dict(env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    running = [subprocess.Popen(a, **kept) for a in argv]
    for process in running:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert out.endswith("right\n")
    assert len(list((tmp_path / "checkpoints").glob("bad_2_*"))) == 1
