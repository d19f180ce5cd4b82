"""The reduced twins of the paper's models on a shorter schedule: the documented commands, from data to figures.

How good they become is measured (docs/paper.md, docs/paper_tasks.md). Here every command runs as it is documented, with
fewer pictures and steps and thinner networks: the losses fall, the figures are there and finite, and those of real
pictures, which need no training, are right, so that conditions, pictures and their readers belong together.
"""

import functools
import json
import math

import numpy as np
import pytest

from ldm_jax import media
from tests import tiny
from tests.tiny import quick_compiles  # noqa: F401 (a fixture of this module)

pytestmark = pytest.mark.slow
STEPS, FIRST, PICTURES = 25, 40, 24  # of training, of an autoencoder's, judged
FALLS = 0.85  # the loss of the last steps, as a part of that of the first ones
COMMON = ("passed", "conditions", "step")

# The figures of each twin's documented evaluation, and those that real pictures reach whatever the model does.
CLASSES = ("accuracy", "accuracy_other", "accuracy_real")
CONDITIONS = {
    "class": (CLASSES, {"accuracy_real": 0.9}),
    "dit": (CLASSES, {"accuracy_real": 0.9}),
    "inpaint": (
        ("psnr_inside", "psnr_inside_mean", "completed", "completed_mean", "objects"),
        {"psnr_inside_mean": 12, "objects": 5},
    ),
    "layout": (("colour", "right", "iou", "whole"), {}),
    "retrieval": (("right", "right_other", "right_real", "objects"), {"right_real": 0.15}),
    "semantic": (("miou", "miou_real"), {"miou_real": 0.85}),
    "upscale": (("psnr", "psnr_bicubic", "psnr_gain"), {"psnr_bicubic": 20}),
}
PRDC = ("precision", "recall", "density", "coverage")


def run(script, *argv):
    assert tiny.call(script, *argv) == 0


@functools.cache
def data():
    return tiny.simple_shapes(tiny.scratch() / "twins", train=600, validation=80, unseen=40)


def smaller(name):
    """What makes a twin's network smaller still."""
    if name in ("demo_autoencoder", "demo_vq"):
        return []
    size = "depth=2" if name == "demo_dit" else "width=32"
    given = [f"--config.model.{size}", "--config.sampler.steps=4"]
    if name in ("demo_layout", "demo_retrieval"):  # cross-attention compiles long
        given.append("--config.model.attention=(0, 1)")
    return given + ["--config.conditioner.layers=1"] * (name == "demo_layout")


def trained(name, *flags, steps=STEPS):
    """A run of a config in configs/, in as few steps."""
    workdir = tiny.scratch() / "twins" / name
    log = dict(every=5, evaluate=steps, save=steps, batches=1, samples=8)
    given = [f"--config.log.{key}={value}" for key, value in log.items()]
    given += [f"--config.steps={steps}", "--config.data.batch=16", "--config.optimizer.warmup=5"]
    given += smaller(name)
    config = ("--config", tiny.ROOT / "configs" / f"{name}.py", "--workdir", workdir)
    run("train", *config, f"--config.data.source.data_dir={data()}", *given, *flags)
    lines = [line["loss"] for line in tiny.metrics(workdir) if "loss" in line]
    assert len(lines) == steps // 5
    assert all(map(math.isfinite, lines))
    return workdir, lines


@functools.cache
def autoencoder():
    workdir, losses = trained("demo_autoencoder", steps=FIRST)
    assert losses[-1] < FALLS * losses[0]
    return workdir


@functools.cache
def features():
    path = data() / "features.safetensors"
    run("ldm_jax/train_features", "--data_dir", data(), "--out", path, "--steps", 40)
    return f"shapes:{path}"


@functools.cache
def index():
    path = data() / "neighbours.npz"
    given = ("--dataset", "shapes/simple", "--data_dir", data(), "--also", "validation")
    run("ldm_jax/neighbours", *given, "--k", 4, "--features", features(), "--out", path)
    return path


def evaluated(workdir, metrics, n, *flags):
    out = workdir / "figures.json"
    given = ("--workdir", workdir, "--metrics", metrics, "--n", n, "--out", out)
    run("ldm_jax/evaluate", *given, *flags)
    return json.loads(out.read_text())


@pytest.mark.parametrize("name", CONDITIONS)
def test_a_twin_with_a_condition_is_trained_and_judged(name):
    flags = [f"--config.codec.run={autoencoder()}"]
    if name == "retrieval":
        flags.append(f"--config.data.source.index={index()}")
    workdir, losses = trained(f"demo_{name}", *flags)
    assert np.mean(losses[-2:]) < FALLS * losses[0]
    found = evaluated(workdir, "condition", PICTURES)
    names, least = CONDITIONS[name]
    outside = {"changed_outside"} if name == "inpaint" else set()
    assert {*names, *COMMON} | outside <= set(found)
    assert all(math.isfinite(found[figure]) for figure in names)
    assert (found["conditions"], found["step"]) == (PICTURES, STEPS)
    assert isinstance(found["passed"], bool)
    for figure, value in least.items():
        assert found[figure] >= value
    if outside:
        assert found["changed_outside"] == 0
    sheet = media.read_png(workdir / "evaluation_condition.png")
    assert len(np.unique(sheet)) > 20


@pytest.mark.parametrize(("name", "metrics"), [("latents", "fid,prdc"), ("pixels", "fid,prdc,bpd")])
def test_a_twin_without_conditions_is_trained_and_measured(name, metrics):
    flags = [f"--config.codec.run={autoencoder()}"] if name == "latents" else []
    workdir, losses = trained(f"demo_{name}", *flags)
    assert np.mean(losses[-2:]) < FALLS * losses[0]
    found = evaluated(workdir, metrics, 72, "--features", features(), "--bpd_steps", 4)
    assert found["fid"] > 0
    assert all(0 <= found[figure] <= 1 for figure in PRDC if figure != "density")
    assert found["step"] == STEPS
    if "bpd" in metrics:
        assert 0 < found["bpd"] < 1000


def test_the_twin_of_codes_is_trained_and_uses_them():
    workdir, losses = trained("demo_vq", "--config.objective.disc_start=20", steps=FIRST)
    assert losses[3] < FALLS * losses[0]  # before the discriminator begins
    found = evaluated(workdir, "psnr,ssim", PICTURES)
    assert found["psnr"] > 8
    assert 0 < found["ssim"] <= 1
    (last,) = [line for line in tiny.metrics(workdir) if "validation/psnr" in line][-1:]
    assert last["validation/usage"] > 0.05
