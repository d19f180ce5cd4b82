"""Whole runs: resume, signals, meshes, and what a run writes."""

import contextlib
import functools
import signal
import textwrap

import jax
import numpy as np
import pytest

from ldm_jax import build, tree
from ldm_jax.build import parts
from ldm_jax.training import checkpoints, loop, sharding, step
from tests import tiny
from tests.tiny import assert_equal, losses, metrics, quick_compiles  # noqa: F401 (a fixture)

pytestmark = pytest.mark.slow

STEPS = 6


def saved_state(workdir, config):
    """The latest checkpoint, as it is on disk."""
    run = build.run(config, workdir)
    with contextlib.closing(checkpoints.Checkpoints(workdir)) as saved:
        return loop.start_state(run, saved)[0]


def config_of(kind, **changes):
    config = tiny.config_of(kind)
    config.update(changes)
    return config


@functools.cache
def uninterrupted(kind):
    """A run of six steps without a stop: its work directory and its last state."""
    workdir = tiny.scratch() / f"uninterrupted_{kind}"
    config = config_of(kind, steps=STEPS)
    assert loop.train(build.run(config, workdir), workdir) == STEPS
    return workdir, saved_state(workdir, config)


def ending(kind, workdir, name, after, *more):
    """A real `train.py` that gets a signal after some of its steps."""
    code = f"""
        import os, signal, sys
        from ldm_jax import cli
        from ldm_jax.training import logs
        advance, seen = logs.Logs.advance, []
        def advance_and_end(self, steps=1):
            advance(self, steps)
            seen.append(steps)
            if len(seen) == {after}:
                os.kill(os.getpid(), signal.{name})
        logs.Logs.advance = advance_and_end
        import train
        cli.run(train.main, train.FLAGS)
    """
    argv = tiny.arguments(kind, workdir, f"--config.steps={STEPS}", *more)
    return tiny.spawn("-c", textwrap.dedent(code), *argv)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_autoencoder_goes_on_to_the_same_bits(workers, tmp_path):
    """With data workers too: to those of a run that was left alone and read in threads."""
    reference, state = uninterrupted("autoencoder")
    run, more = tmp_path / "run", f"--config.data.workers={workers}"
    assert ending("autoencoder", run, "SIGKILL", 5, more).returncode == -signal.SIGKILL
    assert [line["step"] for line in losses(run)][:4] == [1, 2, 3, 4]
    argv = tiny.arguments("autoencoder", run, f"--config.steps={STEPS}", more)
    done = tiny.spawn(tiny.ROOT / "train.py", *argv)
    assert done.returncode == 0, done.stderr
    assert "resumed at step" in done.stderr
    assert_equal(saved_state(run, config_of("autoencoder", steps=STEPS)), state)
    assert losses(run) == losses(reference)


def test_a_text_model_is_saved_on_sigterm_and_ctrl_c_and_goes_on(tmp_path):
    reference, state = uninterrupted("text")
    run = tmp_path / "run"
    done = ending("text", run, "SIGTERM", 3)
    assert done.returncode == 0, done.stderr
    assert "SIGTERM: step 3 is saved; the same command goes on from there" in done.stderr
    done = ending("text", run, "SIGINT", 2)
    assert done.returncode == 0, done.stderr
    assert "resumed at step 3" in done.stderr
    assert "SIGINT: step 5 is saved" in done.stderr
    done = tiny.spawn(
        tiny.ROOT / "train.py", *tiny.arguments("text", run, f"--config.steps={STEPS}")
    )
    assert done.returncode == 0, done.stderr
    assert_equal(saved_state(run, config_of("text", steps=STEPS)), state)
    assert losses(run) == losses(reference)
    # Nothing but our own lines, neither of orbax nor of absl.
    for noise in ("WARNING", "orbax", "absl", "W1", "I1"):
        assert noise not in done.stderr


def test_what_a_run_leaves_behind():
    workdir, _ = uninterrupted("text")
    assert [line["step"] for line in losses(workdir)] == list(range(1, STEPS + 1))
    last = metrics(workdir)[-1]
    assert last["step"] == STEPS
    assert np.isfinite(last["validation/loss"])
    bins = [line[f"loss_t{i}"] for line in losses(workdir) for i in range(4)]
    assert all(value is None or np.isfinite(value) for value in bins)
    assert sum(value is not None for value in bins) > len(bins) / 2
    assert list((workdir / "tensorboard").glob("events.*"))
    assert (workdir / f"images/samples_{STEPS:08d}.png").is_file()
    assert {p.name for p in workdir.iterdir()} >= {"codec.json", "tokenizer.json", "data.json"}
    workdir, _ = uninterrupted("autoencoder")
    assert {"validation/psnr", "validation/ssim"} < metrics(workdir)[-1].keys()
    assert (workdir / f"images/reconstructions_{STEPS:08d}.png").is_file()


# --- meshes


def born(kind, monkeypatch, workdir, devices=None, rules=((".*", "replicate"),), **axes):
    """A run on another mesh, its train step and its first state."""
    mesh = sharding.make_mesh(devices=devices, **axes)
    monkeypatch.setattr(parts, "mesh", lambda config: mesh)
    monkeypatch.setattr(sharding, "FSDP_MIN_SIZE", 64)
    config = tiny.config_of(kind)
    config.sharding = rules
    config.optimizer.eps = 1e-2  # Adam divides by |gradient|: without it, rounding decides
    run = build.run(config, workdir)
    with contextlib.closing(checkpoints.Checkpoints(workdir)) as saved:
        state, layouts = loop.start_state(run, saved)
    out = (layouts, sharding.replicated(mesh))
    train_step = step.make_train_step(run.loss, run.optimizer, run.ema)
    return run, jax.jit(train_step, out_shardings=out), state


def three_losses(run, train_step, state):
    values, batches = [], run.batches(0)
    for _ in range(3):
        batch = sharding.place(run.mesh, next(batches))
        state, values_of_step = train_step(state, run.frozen, batch, jax.random.key(1))
        values.append(float(values_of_step["loss"]))
    return values, state


ON_ONE = dict(data=1)
LAYOUTS = {
    "autoencoder": (dict(data=2, fsdp=4), ((".*", "fsdp"),)),
    "text": (
        dict(data=2, fsdp=2, tensor=2),
        ((".*attn/(q|k|v)/kernel", (None, "tensor")), (".*", "fsdp")),
    ),
}


@functools.cache
def on_one_device(kind):
    with pytest.MonkeyPatch.context() as monkeypatch:
        workdir = tiny.scratch() / f"one_device_{kind}"
        return three_losses(*born(kind, monkeypatch, workdir, devices=jax.devices()[:1], **ON_ONE))[
            0
        ]


def on_axis(axis, part):
    """The leaves that are split over an axis of the mesh."""
    named = zip(tree.names(part), jax.tree.leaves(part), strict=True)
    return {name for name, leaf in named if axis in leaf.sharding.spec}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_eight_devices_learn_what_one_does(kind, monkeypatch, tmp_path):
    expected = on_one_device(kind)
    axes, rules = LAYOUTS[kind]
    run, train_step, state = born(kind, monkeypatch, tmp_path, rules=rules, **axes)
    for axis in axes.keys() - {"data"}:
        # Born sharded, and average and both moments lie as their parameters.
        split = on_axis(axis, state.params)
        assert split
        assert on_axis(axis, state.ema) == split
        assert len(on_axis(axis, state.opt_state)) == 2 * len(split)
    values, after = three_losses(run, train_step, state)
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
