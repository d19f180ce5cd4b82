"""Where a run's time goes: sums and shares by a clock of its own, rates, memory, traces, and who is told."""

import json
import sys
import types

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from tensorboardX.proto import event_pb2

from ldm_jax import build
from ldm_jax.build import parts
from ldm_jax.nn import once
from ldm_jax.training import goodput, logs, loop, profile, sharding, speed
from tests import tiny
from tests.test_loop import linear_run
from tests.tiny import metrics, quick_compiles  # noqa: F401 (a fixture)


class Time:
    """A clock that stands still until it is told how much later it is."""

    def __init__(self, at=0.0):
        self.at = at

    def __call__(self):
        return self.at

    def spend(self, clock, cause, seconds):
        with clock.of(cause):
            self.at += seconds


def begun(workdir, step, time):
    clock = goodput.Clock(workdir, step, time.at, time)
    time.at += 2.0  # of "start"
    clock.turn("compile")
    time.at += 3.0
    clock.turn("train")
    return clock


def test_every_second_has_one_cause(tmp_path):
    time = Time(at=100.0)
    clock = begun(tmp_path, 0, time)
    for _ in range(10):
        time.spend(clock, "data", 0.5)
        time.at += 1.0
    time.spend(clock, "evaluate", 4.0)
    time.spend(clock, "save", 1.0)
    expected = dict(train=10, data=5, compile=3, evaluate=4, save=1, start=2, lost=0)
    shares = clock.shares()
    assert shares.pop("goodput") == pytest.approx(10 / 25)
    expected.pop("train")
    assert shares == pytest.approx({f"goodput/{k}": v / 25 for k, v in expected.items()})
    assert clock.told() == (
        "goodput 40.0% of 25 s (data 20.0%, compile 12.0%, evaluate 16.0%, save 4.0%, start 8.0%)"
    )


def test_what_is_run_twice_is_lost_once(tmp_path):
    """Killed after step 25 (told up to 20), at the checkpoint of step 15; then once more from there."""
    time = Time()
    clock = begun(tmp_path, 0, time)
    for step in (10, 20):
        time.at += 10.0
        clock.write(step)
    time.at += 5.0  # nobody knows of these
    time.at += 1e6  # neither of these
    again = begun(tmp_path, 15, time)
    assert again.seconds == pytest.approx(
        dict(train=15, data=0, compile=6, evaluate=0, save=0, start=4, lost=5)
    )
    again.turn("train")
    time.at += 5.0
    again.write(20)
    third = goodput.Clock(tmp_path, 15, time.at, time)
    assert third.starts == 3
    third.turn("train")
    assert third.seconds["train"] == pytest.approx(15)
    assert third.seconds["lost"] == pytest.approx(10)
    # A run that goes on where it was loses nothing.
    third.write(15)
    assert goodput.Clock(tmp_path, 15, time.at, time).seconds["lost"] == pytest.approx(10)


def curves(folder):
    """{name: {step: value}} of the numbers in TensorBoard's files: records of protocol buffers."""
    found = {}
    for path in sorted(folder.glob("events.*")):
        content = path.read_bytes()
        while content:
            length = int.from_bytes(content[:8], "little")  # a checksum follows, and one at the end
            event = event_pb2.Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            for value in event.summary.value:
                if value.WhichOneof("value") == "simple_value":
                    found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


def test_a_run_tells_where_its_time_went(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(speed, "AFTER", 0.0)
    run = linear_run(batch=8, operations=lambda: 6_000_000)
    loop.train(run, tmp_path)
    loop.train(run._replace(steps=12), tmp_path)
    lines = [line for line in metrics(tmp_path) if "loss" in line]
    for line in lines:
        shares = {k: v for k, v in line.items() if k.startswith("goodput/")}
        assert line["goodput"] + sum(shares.values()) == pytest.approx(1.0)
        assert line["memory_gb"] > 0
    rated = [line for line in lines if "tflops" in line]
    assert rated
    for line in rated:
        assert line["images_per_second"] == pytest.approx(8 * line["steps_per_second"])
        assert line["tflops"] == pytest.approx(6e-6 * line["steps_per_second"])
        assert "mfu" not in line  # of a CPU no peak is known
    # TensorBoard has the same numbers, by cause.
    told = curves(tmp_path / "tensorboard")
    for name in ("loss", "goodput", *(f"goodput/{cause}" for cause in goodput.CAUSES[1:])):
        assert told[name] == pytest.approx({line["step"]: line[name] for line in lines}, rel=1e-6)
    assert {"images_per_second", "tflops", "memory_gb", "waiting_for_data"} < told.keys()
    kept = json.loads((tmp_path / "goodput.json").read_text())
    assert kept["starts"] == 2
    assert set(kept["seconds"]) == set(goodput.CAUSES)
    assert kept["seconds"]["compile"] > 0
    assert kept["seconds"]["lost"] == 0
    told = capsys.readouterr().err
    assert told.count("goodput ") == 2
    assert " s in 2 starts (" in told


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU7x", 2307e12 / 2),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("cpu", None),
    ],
)
def test_the_peak_is_that_of_the_device(kind, expected):
    assert speed.peak(kind) == expected


def test_a_share_of_the_peak(monkeypatch):
    mesh = sharding.make_mesh()
    rate = speed.Speed(4, mesh, lambda: 10**12)
    assert set(rate.of(2.0)) == {"memory_gb", "images_per_second"}
    assert rate._counting is None  # it is too early
    monkeypatch.setattr(speed, "AFTER", 0.0)
    rate.of(2.0)
    rate._counting.result()
    monkeypatch.setattr(speed, "peak", lambda kind: 1e12)
    assert rate.of(2.0)["mfu"] == pytest.approx(2.0 / mesh.devices.size)
    assert set(rate.of(None)) == {"memory_gb"}

    def fails():
        raise ValueError("the operations of a 'while' cannot be counted")

    unknown = speed.Speed(4, mesh, fails)
    unknown.of(2.0)
    with pytest.raises(ValueError, match="while"):
        unknown._counting.result()
    for _ in range(2):
        assert "tflops" not in unknown.of(2.0)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.tanh(nn.Dense(7, use_bias=False)(x))


@pytest.mark.parametrize("remat", [False, True])
def test_operations_are_those_of_the_model_and_not_of_what_is_computed_again(remat):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return once.once(Layer, remat)(name="second")(once.once(Layer, remat)(name="first")(x))

    def loss(params, frozen, batch, rng, step):
        return jnp.sum(Net().apply(params, batch["x"])), {}

    x = jax.ShapeDtypeStruct((4, 5), jnp.float32)
    params = jax.eval_shape(Net().init, jax.random.key(0), x)
    found = parts.operations(loss, params, {}, {"x": x}, jax.random.key(0), 0)
    # Forward, and the gradients of both factors; none of the data.
    assert found == 2 * (2 * 4 * 5 * 7) + 3 * (2 * 4 * 7 * 7)


def test_chosen_steps_are_traced(tmp_path, capsys):
    loop.train(linear_run(), tmp_path, traced=range(3, 5))
    assert "traced the steps up to 4" in capsys.readouterr().err
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    # To the end of a run, and by a process that begins among them.
    loop.train(linear_run(steps=10), tmp_path / "other", traced=range(9, 99))
    assert list((tmp_path / "other/profile").rglob("*.xplane.pb"))


def test_steps_to_trace():
    assert profile.steps_of("20:25") == range(20, 25)
    assert profile.steps_of(None) == range(0)


@pytest.mark.parametrize("text", ["20", "5:5", "a:b", "0:3", "-1:3", "3:"])
def test_steps_that_cannot_be_traced(text, tmp_path, capsys):
    assert tiny.call("train", *tiny.arguments("autoencoder", tmp_path), f"--profile={text}") == 2
    assert "must be START:STOP" in capsys.readouterr().err


@pytest.fixture
def stand_in(monkeypatch):
    """A package wandb that notes what it is told."""
    told = []

    class Run:
        def log(self, values, step):
            told.append(("log", step, values))

        def finish(self):
            told.append(("finish",))

    module = types.ModuleType("wandb")
    module.init = lambda **given: told.append(("init", given)) or Run()
    module.Image = lambda path: ("image", path)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return told


def test_weights_and_biases_is_told_the_same(tmp_path, stand_in):
    loop.train(linear_run(wandb="latents", steps=4), tmp_path)
    loop.train(linear_run(wandb="latents"), tmp_path)
    starts = [given for kind, *rest in stand_in if kind == "init" for given in rest]
    assert len(starts) == 2
    assert starts[0]["project"] == "latents"
    assert starts[0]["id"] == starts[1]["id"]
    assert starts[0]["resume"] == "allow"
    logged = [rest for kind, *rest in stand_in if kind == "log"]
    losses = {step: values["loss"] for step, values in logged if "loss" in values}
    assert losses == {line["step"]: line["loss"] for line in metrics(tmp_path) if "loss" in line}
    images = [values["sheet"] for _, values in logged if "sheet" in values]
    assert images == [("image", str(tmp_path / f"images/sheet_{i:08d}.png")) for i in (4, 8)]
    assert [kind for kind, *_ in stand_in].count("finish") == 2


def test_weights_and_biases_is_not_needed(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    logs.Logs(tmp_path, 0, 1).close()
    monkeypatch.delitem(sys.modules, "wandb")
    argv = tiny.arguments("autoencoder", tmp_path / "run")
    assert tiny.call("train", *argv, "--config.log.wandb=latents") == 2
    assert "pip install 'ldm_jax[wandb]'" in capsys.readouterr().err


@pytest.mark.slow
def test_operations_of_a_run_are_of_its_whole_batch(tmp_path):
    config = tiny.config_of("unconditional")
    one = build.run(config, tmp_path / "one")
    config.data.batch = 16
    config.optimizer.accumulate = 2
    two = build.run(config, tmp_path / "two")
    assert (one.batch, two.batch) == (8, 16)
    assert two.operations() == 2 * one.operations() > 0
