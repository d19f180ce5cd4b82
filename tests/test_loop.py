"""The loop with a model of one layer: NaN, errors, what it tells and writes; and its checkpoints."""

import contextlib
import errno
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from ldm_jax import build
from ldm_jax.models.autoencoder import Gaussian
from ldm_jax.training import (
    checkpoints,
    evaluation,
    logs,
    loop,
    manifest,
    optimizer,
    sharding,
    step,
)
from tests import tiny
from tests.tiny import assert_equal, losses, metrics, quick_compiles  # noqa: F401 (a fixture)


def state_of(params):
    return step.init_state(params, optimizer.adamw(steps=10, lr=1e-3))


PARAMS = {"net": {"kernel": jnp.arange(256.0).reshape(16, 16), "bias": jnp.arange(16.0)}}


def test_a_checkpoint_goes_to_another_mesh(tmp_path, monkeypatch):
    monkeypatch.setattr(sharding, "FSDP_MIN_SIZE", 64)
    rules = ((".*", "fsdp"),)
    shapes = jax.eval_shape(state_of, PARAMS)
    there = sharding.state_layouts(sharding.make_mesh(data=8), rules, shapes)
    here = sharding.state_layouts(sharding.make_mesh(data=2, fsdp=4), rules, shapes)
    state = jax.jit(state_of, out_shardings=there)(PARAMS)
    with contextlib.closing(checkpoints.Checkpoints(tmp_path)) as saved:
        saved.save(state)
        assert saved.wait() == 0
        assert saved.news() == [0]
        assert saved.news() == []
        restored = saved.restore(shapes, here)
        saved.save(state)  # once more is no error
    assert_equal(restored, state)
    assert restored.params["net"]["kernel"].sharding == here.params["net"]["kernel"]
    assert "fsdp" in restored.params["net"]["kernel"].sharding.spec


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"net": {"kernel": PARAMS["net"]["kernel"].astype(jnp.bfloat16), "bias": PARAMS["net"]["bias"]}}, "bfloat16"),
        ({"net": {"kernel": jnp.ones((16, 8)), "bias": PARAMS["net"]["bias"]}}, r"\[16, 8\]"),
        ({"net": {"kernel": PARAMS["net"]["kernel"]}}, "nothing"),
    ],
)  # fmt: skip
def test_a_checkpoint_of_other_parameters_is_refused(params, words, tmp_path):
    mesh = sharding.make_mesh()
    shapes = jax.eval_shape(state_of, params)
    layouts = sharding.state_layouts(mesh, ((".*", "replicate"),), shapes)
    with contextlib.closing(checkpoints.Checkpoints(tmp_path)) as saved:
        saved.save(state_of(PARAMS))
        saved.wait()
        with pytest.raises(checkpoints.Unreadable, match=words):
            saved.restore(shapes, layouts)
    with pytest.raises(checkpoints.Unreadable, match=words):
        checkpoints.load_ema(tmp_path, shapes.ema, layouts.ema)


def linear_loss(params, frozen, batch, rng, at):
    error = batch["x"] @ params["net"]["w"] - frozen
    return jnp.mean(error**2), {"error": jnp.mean(error)}


def linear_run(spoil=lambda at, x: x, **changes):
    """Eight rows of three numbers a step; `spoil(step, x)` changes them."""

    def batches(start):
        at = start
        while True:
            x = np.random.default_rng(at).normal(size=(8, 3)).astype(np.float32)
            yield {"x": spoil(at, x)}
            at += 1

    def evaluate(params, frozen):
        return loop.Evaluation(
            {"validation/w": float(params["net"]["w"][0])}, {"sheet": np.zeros((8, 8, 3), np.uint8)}
        )

    mesh = sharding.make_mesh()
    values = dict(
        seed=0,
        steps=8,
        mesh=mesh,
        rules=((".*", "replicate"),),
        init=lambda key: {"net": {"w": jax.random.normal(key, (3,))}},
        loss=linear_loss,
        optimizer=optimizer.adamw(steps=8, lr=0.1),
        frozen=jax.device_put(jnp.float32(3.0), sharding.replicated(mesh)),
        batches=batches,
        evaluate=evaluate,
        ema=0.9,
        accumulate=1,
        log_every=1,
        eval_every=4,
        save_every=4,
        keep=3,
        max_skipped=3,
    )
    return loop.Run(**(values | changes))


def on_devices(n):
    mesh = sharding.make_mesh(devices=jax.devices()[:n])
    return dict(mesh=mesh, frozen=jax.device_put(jnp.float32(3.0), sharding.replicated(mesh)))


def restored(run, workdir):
    with contextlib.closing(checkpoints.Checkpoints(workdir)) as saved:
        return loop.start_state(run, saved)[0]


def test_a_run_tells_what_it_does(tmp_path, capsys):
    loop.train(linear_run(), tmp_path)
    told = capsys.readouterr().err
    for words in (
        "3 parameters on 8 cpu device(s): data 8",
        "first step after",
        "step 4: validation/w",
    ):
        assert words in told
    assert told.count("saved step 4") == told.count("saved step 8") == 1
    assert loop.train(linear_run(), tmp_path) == 8
    assert "resumed at step 8 of 8; nothing is left to do" in capsys.readouterr().err


def test_norms_by_group_are_logged_where_they_are_asked_for(tmp_path):
    for groups in (True, False):
        loop.train(linear_run(groups=groups, steps=2), tmp_path / str(groups))
        for line in losses(tmp_path / str(groups)):
            assert ("grad_norm/net" in line) == groups
            assert line.get("grad_norm/net", line["grad_norm"]) == pytest.approx(line["grad_norm"])


def test_a_bad_batch_is_skipped_and_counted(tmp_path):
    def spoil(at, x):
        return np.full_like(x, np.nan) if at == 3 else x

    run = linear_run(spoil)
    assert loop.train(run, tmp_path) == 8
    lines = losses(tmp_path)
    assert [line["skipped"] for line in lines] == [0, 0, 0, 1, 0, 0, 0, 0]
    assert lines[3]["loss"] is None  # JSON knows no NaN
    assert np.isfinite(restored(run, tmp_path).params["net"]["w"]).all()


def test_too_many_bad_batches_stop_the_run(tmp_path, monkeypatch, capsys):
    def spoil(at, x):
        return np.full_like(x, np.inf) if at >= 4 else x

    run = linear_run(spoil)
    with pytest.raises(loop.TrainingStopped, match=r"3 steps in a row .*first bad leaf is 'x'"):
        loop.train(run, tmp_path)
    state = restored(run, tmp_path)
    assert (int(state.step), int(state.skipped)) == (7, 3)
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(state))
    good = tmp_path / "good"
    loop.train(linear_run(steps=4), good)
    assert_equal(state.params, restored(linear_run(), good).params)
    # The command ends with one sentence and not with 0.
    monkeypatch.setattr(build, "run", lambda config, workdir: run)
    capsys.readouterr()
    argv = tiny.arguments("autoencoder", tmp_path)
    assert tiny.call("train", *argv) == 2
    assert "error: " in capsys.readouterr().err


def test_a_last_state_that_cannot_be_saved_ends_the_command_with_an_error(
    tmp_path, monkeypatch, capsys
):
    def full(folder, write=manifest.write):
        if folder.name.startswith("8."):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(folder)

    monkeypatch.setattr(manifest, "write", full)
    monkeypatch.setattr(build, "run", lambda config, workdir: linear_run())
    assert tiny.call("train", *tiny.arguments("autoencoder", tmp_path)) == 2
    told = capsys.readouterr().err
    assert "saved step 4" in told
    assert "saved step 8" not in told
    assert (
        "error: step 8 could not be saved (No space left on device); the last step that is saved is 4"
        in told
    )


def test_the_leaf_whose_gradient_is_bad_is_named(tmp_path):
    def loss(params, frozen, batch, rng, at):
        value, aside = linear_loss(params, frozen, batch, rng, at)
        zero = params["net"]["w"] * 0.0
        return value + jnp.sqrt(zero @ zero), aside  # its gradient is 0/0

    with pytest.raises(loop.TrainingStopped, match="'net/w' of the gradient"):
        loop.train(linear_run(loss=loss), tmp_path)


def test_an_error_within_a_step_is_not_hidden(tmp_path):
    def burst(x):
        if x > 2:
            raise RuntimeError("the device burst")
        return x

    def loss(params, frozen, batch, rng, at):
        value, aside = linear_loss(params, frozen, batch, rng, at)
        shape = jax.ShapeDtypeStruct((), jnp.int32)
        return value + jax.pure_callback(burst, shape, at), aside

    # On one device: the others would wait for it for ever.
    run = linear_run(loss=loss, save_every=2, **on_devices(1))
    with pytest.raises(Exception, match="the device burst"):
        loop.train(run, tmp_path)
    assert int(restored(linear_run(), tmp_path).step) == 2


def test_an_error_outside_of_a_step_loses_nothing(tmp_path):
    def evaluate(params, frozen):
        raise RuntimeError("no paper")

    with pytest.raises(RuntimeError, match="no paper"):
        loop.train(linear_run(evaluate=evaluate, eval_every=3), tmp_path)
    assert int(restored(linear_run(), tmp_path).step) == 3


def test_data_that_cannot_be_read_stops_with_a_sentence(tmp_path):
    def spoil(at, x):
        if at == 5:
            raise ValueError("12 of 100 records cannot be read")
        return x

    with pytest.raises(loop.TrainingStopped, match="12 of 100 records"):
        loop.train(linear_run(spoil), tmp_path)
    assert int(restored(linear_run(), tmp_path).step) == 5


def test_numbers_are_fetched_when_a_line_is_due(tmp_path, monkeypatch):
    fetched = []
    monkeypatch.setattr(
        jax, "device_get", lambda x, get=jax.device_get: fetched.append(len(x)) or get(x)
    )
    loop.train(linear_run(log_every=4, eval_every=100), tmp_path)
    assert fetched == [4, 4]
    assert [line["step"] for line in losses(tmp_path)] == [4, 8]


def test_accumulated_micro_batches_are_the_whole_batch(tmp_path):
    for name, accumulate in (("whole", 1), ("parts", 4)):
        loop.train(linear_run(accumulate=accumulate, **on_devices(2)), tmp_path / name)
    whole, parts_ = ([m["loss"] for m in losses(tmp_path / name)] for name in ("whole", "parts"))
    np.testing.assert_allclose(parts_, whole, rtol=1e-5)


def test_lines_that_will_be_written_again_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with contextlib.closing(logs.Logs(tmp_path, 0, 10)) as log:
        for at in range(1, 6):
            log.scalars(at, {"loss": float(at) if at != 2 else np.nan})
    path.write_text(path.read_text() + '{"step": 6, "lo')  # killed in the middle of a line
    with contextlib.closing(logs.Logs(tmp_path, 3, 10)) as log:
        log.scalars(4, {"loss": 40.0})
        log.image(4, "sheet", np.zeros((8, 8, 3), np.uint8))
    assert [(m["step"], m["loss"]) for m in metrics(tmp_path)] == [
        (1, 1),
        (2, None),
        (3, 3),
        (4, 40),
    ]
    assert (tmp_path / "images/sheet_00000004.png").is_file()
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_a_validation_loss_is_that_of_the_parameters_alone():
    def loss(params, frozen, batch, rng, at):
        noise = jax.random.normal(rng, batch["x"].shape)
        return jnp.mean((batch["x"] + noise) @ params["net"]["w"] + frozen), {}

    mesh = sharding.make_mesh()
    fixed = [{"x": np.ones((8, 3), np.float32)}] * 2
    evaluate = evaluation.diffusion(loss, mesh, fixed, lambda p, f: np.zeros((4, 8, 8, 3)), None)
    params = {"net": {"w": jnp.array([1.0, 2.0, 3.0])}}
    first, second = (evaluate(params, 0.0) for _ in range(2))
    assert first.scalars == second.scalars
    other = evaluate(jax.tree.map(lambda w: w + 1, params), 0.0)
    assert other.scalars != first.scalars
    assert first.images["samples"].dtype == np.uint8


def test_a_reconstruction_that_is_perfect_has_no_error():
    class Perfect(nn.Module):
        def encode(self, x):
            return Gaussian(mean=x, logvar=jnp.zeros_like(x))

        def decode(self, z):
            return z

    fixed = [{"x": np.random.default_rng(0).uniform(-1, 1, (8, 16, 16, 3)).astype(np.float32)}]
    evaluate = evaluation.autoencoder(Perfect(), sharding.make_mesh(), fixed, shown=4)
    result = evaluate({"gen": {}}, {})
    assert result.scalars["validation/psnr"] == np.inf
    np.testing.assert_allclose(result.scalars["validation/ssim"], 1.0, rtol=1e-6)
    originals, reconstructions = np.split(result.images["reconstructions"][8:-8], 2)
    np.testing.assert_array_equal(originals[:128], reconstructions[-128:])
