"""Counts of operations in closed form, and the benchmark of samplers on a model that takes no time."""

import dataclasses
import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import benchmark, media
from ldm_jax.flops import flops
from ldm_jax.measure import models, plot, programs, rival, sampler, timing, train
from ldm_jax.models import unet
from ldm_jax.nn import attend, conv
from ldm_jax.pretrained import components
from ldm_jax.types import Cond
from tests import tiny
from tests.tiny_benchmark import SMALLEST


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def test_operations_of_a_matrix_product_and_of_what_repeats_it():
    x, w = shape(3, 5, 7), shape(7, 11)
    once = 2 * 3 * 5 * 7 * 11
    assert flops(lambda x, w: x @ w, x, w) == once
    assert flops(jax.jit(lambda x, w: jnp.tanh(x @ w) + 1), x, w) == once
    assert flops(jax.grad(lambda x, w: (x @ w).sum(), (0, 1)), x, w) == 3 * once

    def several(x, w):
        x, _ = jax.lax.scan(lambda x, _: (x @ w @ w.T, None), x, length=10)
        return jax.lax.cond(x[0, 0, 0] > 0, lambda: x @ w @ w.T, lambda: x)

    assert flops(several, x, w) == 11 * 2 * once
    with pytest.raises(ValueError, match="'while' cannot be counted"):
        flops(lambda w: jax.lax.while_loop(lambda w: w[0, 0] > 0, lambda w: w @ w, w), shape(7, 7))


def test_operations_of_convolutions_and_attention_are_those_of_the_formula():
    x = shape(2, 12, 8, 6)
    module = conv.Conv(10, (3, 2), stride=(2, 1))
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    assert flops(module.apply, variables, x) == 2 * (2 * 6 * 8) * 10 * (3 * 2 * 6)
    up = conv.Upsample(2)
    variables = jax.eval_shape(up.init, jax.random.key(0), x)
    assert flops(up.apply, variables, x) == 2 * (2 * 24 * 16) * 6 * (9 * 6)
    # Blocks compute nothing twice here, whatever the CPU does.
    q = shape(2, 300, 4, 8)
    assert flops(attend.attend, q, q, q) == 2 * 2 * (2 * 4) * 300 * 300 * 8


def test_stable_diffusion_takes_as_many_operations_as_published():
    config = models.MODELS["sd15"]()[0]["unet"]
    made = components.make(config["_class_name"], config, "float32")

    def forward(params, x, t, tokens):
        return made.module.apply({"params": params}, x, t, Cond(tokens=tokens))

    counted = flops(forward, made.shapes, shape(1, 64, 64, 4), shape(1), shape(1, 77, 768))
    assert counted / 1e9 == pytest.approx(803.3, abs=0.1)
    assert isinstance(made.module, unet.UNet)


def flagged(monkeypatch, benchmark=sampler, **given):
    monkeypatch.setitem(models.MODELS, "smallest", lambda: SMALLEST)
    for name in benchmark.FLAGS:
        benchmark.FLAGS[name].unparse()
    given = dict(model="smallest", repeats="2") | given
    if benchmark is sampler:
        given = dict(steps="1") | given
    benchmark.FLAGS(["benchmark", *(f"--{name}={value}" for name, value in given.items())])


@pytest.mark.slow
def test_the_benchmark_measures_every_part(monkeypatch, tmp_path, capsys):
    out = tmp_path / "results.json"
    flagged(monkeypatch, batch="1", out=out)
    sampler.main(sampler.prepare())
    found = json.loads(out.read_text())
    (row,) = found["rows"]
    assert found["model"] == "smallest"
    assert found["matmul_tflops"] > 0
    for part in sampler.PARTS:
        measured = row[part]
        assert 0 < measured["seconds"] <= measured["seconds_p90"]
        assert measured["xla_flops"] > 0
        rate = measured["flops"] / measured["cpu_seconds"]
        assert measured["tflops"] == pytest.approx(rate / 1e12)
        assert measured["of_matmul_rate"] == pytest.approx(
            measured["tflops"] / found["matmul_tflops"]
        )
    parts = sum(row[part]["flops"] for part in ("text", "loop", "decode"))
    assert row["together"]["flops"] == parts
    assert row["compile_seconds"] > row["compile_seconds_cached"] > 0
    assert row["program_bytes"] > 0
    printed = capsys.readouterr().out
    assert "| ldm_jax | 1 |" in printed
    picture = media.read_png(out.with_suffix(".png"))
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 3


@pytest.mark.slow
def test_the_benchmark_of_training_measures_every_part(monkeypatch, tmp_path, capsys):
    out = tmp_path / "results.json"
    flagged(monkeypatch, train, batch="2", out=out)
    train.main(train.prepare())
    (row,) = json.loads(out.read_text())["rows"]
    for part in train.PARTS:
        assert row[part]["cpu_seconds"] > 0
        rate = row[part]["flops"] / row[part]["cpu_seconds"]
        assert row[part]["tflops"] == pytest.approx(rate / 1e12)
    # The gradient of a product takes two; that of the first layer's input, a convolution, is not needed.
    assert 2.9 * row["loss"]["flops"] < row["gradient"]["flops"] < 3 * row["loss"]["flops"]
    assert "| ldm_jax | 2 |" in capsys.readouterr().out
    assert out.with_suffix(".png").is_file()


def test_a_step_of_the_benchmark_is_adam_on_the_loss_of_the_noise():
    subject = models.random("smallest", *SMALLEST, "float32")
    given = train.given_batch(subject, 2, 8)
    loss, params = train.loss_of(subject), subject.params["network"]
    t = jnp.asarray(given["t"], jnp.float32)
    alpha = subject.model.path.alpha(t / 999)[:, None, None, None]
    x_t = alpha * given["x0"] + jnp.sqrt(1 - alpha**2) * given["eps"]
    out = jax.jit(subject.model.network.apply)({"params": params}, x_t, t, given["cond"])
    expected = jnp.square(out - given["eps"]).mean()
    np.testing.assert_allclose(jax.jit(loss)(params, given), expected, rtol=1e-5)
    weights = {"w": jnp.array([1.0, -2.0])}
    runs, _ = train.compiled(lambda params, _: jnp.square(params["w"]).sum(), weights, 0)
    runs["step"]()
    # Adam's first step is the rate, against the gradient's sign, after the decay.
    lr, decay = train.ADAMW["lr"], train.ADAMW["weight_decay"]
    expected = weights["w"] * (1 - lr * decay) - lr * jnp.sign(weights["w"])
    np.testing.assert_allclose(runs["step"].state[0]["w"], expected, rtol=1e-6)
    np.testing.assert_array_equal(weights["w"], [1.0, -2.0])  # a copy was changed


@pytest.mark.slow
def test_models_of_our_own_are_measured_by_config_and_by_run(tmp_path):
    """The config's model is that of the run: as many operations, with weights that are random."""
    run = tiny.shared_model("text")
    file = tmp_path / "config.py"
    file.write_text(
        "from tests import tiny\n\n\ndef get_config():\n    return tiny.config_of('text')\n"
    )
    counts = []
    for name in (str(file), str(run)):
        subject = models.subject(name, "float32")
        made = programs.programs(subject, "ddim", 2, 3.0, 1, subject.side)
        f, args = made["together"]
        assert jax.eval_shape(f, *args).shape == (1, 16, 16, 3)
        counts.append(flops(f, *args))
    assert counts[0] == counts[1] > 0
    with pytest.raises(ValueError, match="computes in float32; say so: --dtype float32"):
        models.subject(str(file), "bfloat16")
    (tmp_path / "none.py").write_text("")
    with pytest.raises(ValueError, match="has no function get_config"):
        models.subject(str(tmp_path / "none.py"), "float32")


def test_guidance_doubles_the_network_and_steps_repeat_it():
    subject = models.random("smallest", *SMALLEST, "float32")

    def count(scale, steps):
        f, args = programs.programs(subject, "ddim", steps, scale, 1, 8)["loop"]
        return flops(f, *args)

    assert count(7.5, 3) == 2 * 3 * count(1.0, 1)


def test_turns_are_taken_and_ratios_are_of_pairs():
    turns = []
    spent = timing.interleaved({"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}, 2)
    assert turns == ["a", "b"] * 3
    assert len(spent["a"].wall) == len(spent["b"].busy) == 2
    assert timing.ratio([2.0, 9.0, 4.0], [1.0, 3.0, 2.0]) == 2.0
    found = timing.Spent([1.0, 2.0, 3.0], [0.1, 0.2, 0.3]).summary()
    assert (found["seconds"], found["cpu_seconds"]) == (2.0, 0.2)
    assert found["seconds_p90"] == pytest.approx(2.8)


def test_a_bar_is_as_long_as_its_number(tmp_path):
    plot.bars(tmp_path / "bars.png", "title", [("a, 1", 1.0), ("b, 1", 2.0)], "images/s")
    picture = media.read_png(tmp_path / "bars.png").reshape(-1, plot.WIDTH, 3)

    def length(colour):
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        return (picture == rgb).all(-1).sum(1).max()

    assert length(plot.COLOURS[1]) == pytest.approx(2 * length(plot.COLOURS[0]), abs=3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(model="sd51"), "there is no model 'sd51'; the choices are"),
        (dict(batch="1,many"), "--batch=1,many is no list of numbers"),
        (dict(batch="0"), "--batch=0 is no list of numbers"),
        (dict(solver="dim"), "there is no solver 'dim'"),
        (dict(steps=2000), "2000 steps were asked of a table of 1000"),
    ],
)
def test_what_is_not_there_is_told_before_any_compile(monkeypatch, given, message):
    flagged(monkeypatch, **given)
    with pytest.raises(ValueError, match=message):
        sampler.prepare()


def test_a_comparison_needs_what_it_compares_with(monkeypatch):
    real = importlib.import_module

    def missing(name, *more):
        if name in ("torch", "diffusers", "transformers"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *more)  # jax imports some of its own parts late

    flagged(monkeypatch, against="diffusers")
    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ValueError, match="--against diffusers needs the parity extra"):
        sampler.prepare()
    subject = models.random("smallest", *SMALLEST, "float32")
    with pytest.raises(ValueError, match="written here for ddim, and not for 'heun'"):
        rival.check(subject, "heun")
    model = subject.model._replace(conditioner=None)
    with pytest.raises(ValueError, match="layout that read tokens alone"):
        rival.check_training(dataclasses.replace(subject, model=model))


def test_benchmarks_by_name(monkeypatch, capsys):
    for argv, message in (
        (["samplers"], "name a benchmark: ['families', 'latent-vs-pixel', 'sampler', 'train']"),
        (["sampler", "--stepps=3"], "unknown arguments ['--stepps=3']"),
    ):
        with pytest.raises(SystemExit) as ended:
            benchmark.main(["benchmark", *argv])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
    flagged(monkeypatch, model="sd51")
    with pytest.raises(SystemExit):
        benchmark.main(["benchmark", "sampler"])
    assert "error: there is no model 'sd51'" in capsys.readouterr().err
