"""Several processes: what they are told, what they agree on, and real runs of two, which train and stop together."""

import signal
import socket
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.training import processes
from tests import tiny
from tests.test_cli import sentence
from tests.tiny import losses, metrics, quick_compiles  # noqa: F401 (a fixture)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--num_processes=2"], "--coordinator and --process_id must be given too"),
        (["--coordinator=a:1", "--process_id=0"], "--num_processes must be given too"),
        (["--coordinator=a", "--process_id=0", "--num_processes=2"], "--coordinator=a is no"),
        (["--coordinator=a:1", "--process_id=2", "--num_processes=2"], "from 0 to 1"),
        (["--distributed"], "the environment is none that jax knows"),
    ],
)
def test_what_is_missing_is_named(argv, words, tmp_path, capsys, monkeypatch):
    from jax._src import clusters, xla_bridge

    # Whatever machine this runs on, it is no cluster; and other tests have used its devices.
    monkeypatch.setattr(clusters.ClusterEnv, "_cluster_types", [])
    monkeypatch.setattr(xla_bridge, "backends_are_initialized", lambda: False)
    assert tiny.call("train", *tiny.arguments("autoencoder", tmp_path / "run", *argv)) == 2
    jax.config.update("jax_enable_preemption_service", False)
    assert words in sentence(capsys)
    assert not (tmp_path / "run").exists()


def test_one_process_agrees_with_itself():
    processes.agree({"the config": "a"})
    processes.agree_on_arrays("the parameter", {"w": jnp.ones(3)})
    assert not processes.stop_here(0)


def test_a_checksum_notices_every_bit_and_no_layout():
    x = jax.random.normal(jax.random.key(0), (8, 6, 5))
    of = jax.jit(processes.checksum)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))
    assert int(of(split)) == int(of(x))
    bits = np.asarray(x).view(np.uint32)
    for place, bit in (((0, 0, 0), 0), ((3, 5, 1), 31), ((7, 5, 4), 17)):
        other = bits.copy()
        other[place] ^= np.uint32(1 << bit)
        assert int(of(other.view(np.float32))) != int(of(x))
    swapped = jnp.stack([x[1], x[0], *x[2:]])
    assert int(of(swapped)) != int(of(x))


# --- real processes

MEETS = """
import jax
from ldm_jax.training import processes
processes.meet(distributed=True)
print(jax.process_index(), jax.process_count(), jax.config.values["jax_cuda_visible_devices"])
"""


def of_slurm(i, beside, local):
    about = dict(JOB_ID=4321, STEP_NODELIST="localhost", NTASKS=2, PROCID=i, LOCALID=local)
    return {f"SLURM_{k}": str(v) for k, v in about.items()} | {"SLURM_STEP_TASKS_PER_NODE": beside}


def of_open_mpi(i, beside, local):
    about = dict(SIZE=2, RANK=i, LOCAL_RANK=local, LOCAL_SIZE=beside)
    at = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911"}
    return at | {f"OMPI_COMM_WORLD_{k}": str(v) for k, v in about.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "beside", "locally", "visible"),
    [
        (of_slurm, "1(x2)", (0, 0), ("all", "all")),  # one on each host has all GPUs of it
        (of_slurm, "2", (0, 1), ("0", "1")),
        (of_open_mpi, "2", (0, 1), ("0", "1")),
    ],
)
def test_the_environment_tells_who_is_who(environment, beside, locally, visible):
    kept, argv = dict(stdout=subprocess.PIPE, text=True), [sys.executable, "-c", MEETS]
    both = [
        subprocess.Popen(argv, env=tiny.environment() | environment(i, beside, locally[i]), **kept)
        for i in range(2)
    ]
    told = [one.communicate(timeout=300)[0] for one in both]
    assert told == [f"{i} 2 {visible[i]}\n" for i in range(2)]


def two(argv_of, before="", devices=4):
    """Starts `train.py` twice, as the processes 0 and 1 of one run; `before` is code for both."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    code = textwrap.dedent(before) + textwrap.dedent("""
        import train
        from ldm_jax import cli
        cli.run(train.main, train.FLAGS)
    """)
    environment = tiny.environment() | {"JAX_NUM_CPU_DEVICES": str(devices)}
    meeting = [f"--coordinator=localhost:{port}", "--num_processes=2"]
    return [
        subprocess.Popen(
            [sys.executable, "-c", code, *map(str, argv_of(i)), *meeting, f"--process_id={i}"],
            env=environment,
            cwd=tiny.scratch(),
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]


def ended(both):
    """The exit statuses and what the processes said; none is left behind."""
    try:
        told = [one.communicate(timeout=900)[1] for one in both]
    finally:
        for one in both:
            one.kill()
    return [one.returncode for one in both], told


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["judged", "text"])
def test_two_processes_learn_what_one_does(kind, tmp_path):
    one, many = tmp_path / "one", tmp_path / "two"
    more = ("--config.steps=4", "--config.log.evaluate=4")
    done = tiny.spawn(tiny.ROOT / "train.py", *tiny.arguments(kind, one, *more))
    assert done.returncode == 0, done.stderr
    status, told = ended(two(lambda i: tiny.arguments(kind, many, *more)))
    assert status == [0, 0], told
    assert "8 cpu device(s) of 2 processes" in told[0]
    assert "parameters on" not in told[1]  # the first one speaks
    assert "step" not in told[1].replace("train_step", "")
    for a, b in zip(losses(one), losses(many), strict=True):
        np.testing.assert_allclose(b["loss"], a["loss"], rtol=1e-6)
    last = [
        {k: v for k, v in metrics(workdir)[-1].items() if "validation" in k}
        for workdir in (one, many)
    ]
    assert last[0]
    for name, value in last[0].items():
        np.testing.assert_allclose(last[1][name], value, rtol=1e-5)
    if kind == "judged":
        found = [metrics(workdir)[-1]["evaluation/kid"] for workdir in (one, many)]
        assert found[1] == pytest.approx(found[0], rel=0.01)  # pictures are rounded to 8 bits
    names = [sorted(p.name for p in (w / "images").iterdir()) for w in (one, many)]
    assert names[0] == names[1] != []
    # Either goes on where the other ended, with as many processes as it likes.
    longer = ("--config.steps=6", *more[1:])
    done = tiny.spawn(tiny.ROOT / "train.py", *tiny.arguments(kind, many, *longer))
    assert done.returncode == 0, done.stderr
    assert "resumed at step 4" in done.stderr
    status, told = ended(two(lambda i: tiny.arguments(kind, one, *longer)))
    assert status == [0, 0], told
    assert "resumed at step 4" in told[0]
    assert [line["step"] for line in losses(many)] == [1, 2, 3, 4, 5, 6]
    for a, b in zip(losses(one), losses(many), strict=True):
        np.testing.assert_allclose(b["loss"], a["loss"], rtol=1e-6)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_at_the_same_step(tmp_path):
    run, endless = tmp_path / "run", ("steps", "log.save", "log.evaluate")
    argv = tiny.arguments("pixels", run, *(f"--config.{k}=100000" for k in endless))
    both = two(lambda i: argv)
    until = time.monotonic() + 600
    while time.monotonic() < until and not ((run / "metrics.jsonl").is_file() and losses(run)):
        time.sleep(0.2)
    both[1].send_signal(signal.SIGTERM)
    status, told = ended(both)
    assert status == [0, 0], told
    assert "SIGTERM: step" in told[0]
    saved = sorted(p.name for p in (run / "checkpoints").iterdir() if p.name.isdigit())
    assert len(saved) == 1
    assert f"step {saved[0]} is saved" in told[0]
    assert losses(run)[-1]["step"] == int(saved[0])


HANGS = """
    import ctypes, os
    from pathlib import Path
    from ldm_jax.training import compiled
    finish, hangs = compiled.finish, {hangs}

    def hang(*given):
        import jax
        made = finish(*given)
        Path({folder!r}, f"reached_{{jax.process_index()}}").touch()
        if jax.process_index() in hangs:  # locks a mutex twice: native code that never returns
            mutex = ctypes.create_string_buffer(64)
            ctypes.CDLL(None).pthread_mutex_lock(mutex)
            ctypes.CDLL(None).pthread_mutex_lock(mutex)
        return made

    compiled.finish = hang
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hangs", "told", "number"),
    [
        ((0, 1), (0, 1), signal.SIGTERM),
        ((1,), (0,), signal.SIGTERM),  # the other one is ready, and waits for it
        ((0, 1), (1,), signal.SIGINT),
    ],
)
def test_a_signal_during_the_first_compile_ends_both_at_once(hangs, told, number, tmp_path):
    run = tmp_path / "run"
    argv = tiny.arguments("pixels", run)
    both = two(lambda i: argv, before=HANGS.format(hangs=hangs, folder=str(tmp_path)))
    until = time.monotonic() + 300
    while time.monotonic() < until and len(list(tmp_path.glob("reached_*"))) < 2:
        time.sleep(0.1)
    began = time.monotonic()
    for i in told:
        both[i].send_signal(number)
    status, words = ended(both)
    assert status == [0, 0], words
    assert time.monotonic() - began < 30
    for one in words:
        assert "nothing is new that could be saved" in one
        assert "Traceback" not in one
    assert not [p for p in (run / "checkpoints").iterdir() if p.name.isdigit()]
    assert not (run / "metrics.jsonl").is_file() or not losses(run)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("differs", "words"),
    [
        ("--config.optimizer.lr=0.5", "do not agree on the config: [1] differ from process 0"),
        ("", "do not agree on the parameter"),
    ],
)
def test_processes_that_differ_do_not_start(differs, words, tmp_path):
    spoilt = """
        import os, sys
        from ldm_jax.training import loop
        start = loop.start_state
        def other(run, saved):
            import jax
            state, layouts = start(run, saved)
            def mine(path, leaf):
                if jax.process_index() == 1 and "conv_in" in jax.tree_util.keystr(path):
                    parts = [s.data + 1 for s in leaf.addressable_shards]
                    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, parts)
                return leaf
            return state.replace(params=jax.tree_util.tree_map_with_path(mine, state.params)), layouts
        loop.start_state = other
    """
    status, told = ended(
        two(
            lambda i: tiny.arguments("pixels", tmp_path / "run", *[differs][: i and len(differs)]),
            before="" if differs else spoilt,
        )
    )
    assert status == [2, 2], told
    for one in told:
        assert words in one
        assert "Traceback" not in one
    if not differs:
        assert "conv_in/kernel" in told[0]
    else:
        assert not (tmp_path / "run").exists()
