"""Metrics at intervals while a run trains: when they are due, what they change (nothing), and what they find."""

import json

import jax
import numpy as np
import pytest

from ldm_jax import build
from ldm_jax.training import checkpoints, guards, loop
from ldm_jax.training.run import Periodic
from tests import tiny
from tests.test_loop import linear_run, restored
from tests.tiny import assert_equal, losses, metrics, quick_compiles  # noqa: F401 (a fixture)


def judged(every, values):
    """An evaluation that draws numbers of its own wherever numbers can be drawn, and tells the next of `values`."""
    left = iter(values)

    def evaluate(params, frozen):
        np.random.seed(1)
        np.random.uniform(size=7)
        jax.random.normal(jax.random.key(3), (5,)).block_until_ready()
        return loop.Evaluation({"evaluation/fid": float(next(left))}, {})

    return Periodic(every, evaluate)


def told(workdir, name="evaluation/fid"):
    return {line["step"]: line[name] for line in metrics(workdir) if name in line}


def test_what_is_measured_at_intervals_changes_nothing(tmp_path):
    loop.train(linear_run(), tmp_path / "without")
    run = linear_run(judged=judged(3, range(9)))
    loop.train(run, tmp_path / "with")
    assert told(tmp_path / "with") == {3: 0, 6: 1, 8: 2}  # and at the end
    assert list(told(tmp_path / "with", "validation/w")) == [4, 8]
    states = [restored(linear_run(), tmp_path / name) for name in ("with", "without")]
    assert_equal(*states)
    assert losses(tmp_path / "with") == losses(tmp_path / "without")


def test_the_best_by_such_a_metric_stays_and_none_better_ends_the_run(tmp_path):
    values = [5.0, 1.0, 2.0, 3.0, 4.0]
    watched = guards.Guards(patience=2, metric="evaluation/fid")
    options = dict(
        guards=watched, keep=checkpoints.Keep(1, best=1), save_every=2, eval_every=1, steps=20
    )
    run = linear_run(judged=judged(2, values), **options)
    assert loop.train(run, tmp_path) == 8  # 1.0 at step 4, and two that are no better
    kept = {int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()}
    assert kept == {4, 8}
    assert loop.train(linear_run(judged=judged(2, []), **options), tmp_path) == 8
    # A step at which only the other evaluation is due does not have the metric; one that has both must.
    wrong = watched._replace(metric="evaluation/fidd")
    run = linear_run(judged=judged(2, values), **options | dict(guards=wrong))
    with pytest.raises(loop.TrainingStopped, match="'evaluation/fidd' is none of the evaluation's"):
        loop.train(run, tmp_path / "wrong")
    assert int(restored(linear_run(), tmp_path / "wrong").step) == 2


@pytest.fixture
def shapes():
    return tiny.shared_features()


def config_of(kind, shapes, **section):
    config = tiny.config_of(kind)
    given = dict(every=2, metrics=("kid", "prdc"), n=16, features=shapes, batch=8, subset=8)
    with config.ignore_type():
        config.data.size = 32  # that of the features
        config.evaluation = given | section
    return config


@pytest.mark.parametrize(
    ("kind", "section", "words"),
    [
        ("pixels", dict(every=0), "evaluation.every = 0 must be at least 1"),
        ("pixels", dict(evry=3), "evaluation.evry is unknown; did you mean 'every'"),
        ("pixels", dict(metrics=("fidd",)), "there is no 'fidd'; did you mean 'fid'"),
        ("pixels", dict(metrics=()), "evaluation.metrics names none"),
        ("pixels", dict(metrics=("psnr",)), "'psnr' in evaluation.metrics does not fit"),
        ("pixels", dict(features="inception"), "pt_inception-2015-12-05-6726825d.pth"),
        ("pixels", dict(metrics=("fid",)), "needs 65 generated pictures"),
        ("pixels", dict(n=4000), "examples, not 4000"),
        ("pixels", dict(metrics=("clip",)), "clip needs a CLIP model"),
        ("pixels", dict(reference="nowhere.npz"), "there is no file nowhere.npz"),
        ("pixels", dict(guidance=2.0), "nothing to guide"),
        ("autoencoder", dict(metrics=("fid",), subset=8), "evaluation.subset is unknown"),
        ("autoencoder", dict(metrics=("rfid",)), "needs 65 original pictures"),
    ],
)
def test_what_cannot_be_measured_is_told_before_any_compile(kind, section, words, shapes, tmp_path):
    config = config_of(kind, shapes, **section)
    if kind == "autoencoder" and "subset" not in section:
        del config.evaluation.subset
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        build.run(config, tmp_path / "run")
    assert words in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_metric_that_chooses_checkpoints_is_one_of_the_evaluation(shapes, tmp_path):
    config = config_of("pixels", shapes)
    with config.ignore_type():
        config.log.metric = "evaluation/fid"
    with pytest.raises(
        ValueError, match="'evaluation/fid' is none of the evaluation's; did you mean"
    ):
        build.run(config, tmp_path)
    del config.evaluation
    with pytest.raises(ValueError, match="of the section evaluation, which the config lacks"):
        build.run(config, tmp_path)


class Compiles:
    """How many programs XLA compiled since the last look."""

    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, name, *_, **__):
        self.count += name.endswith("backend_compile_duration")

    def new(self):
        found, self.count = self.count, 0
        return found


def test_a_model_of_pixels_is_measured_in_programs_that_are_compiled_once(shapes, tmp_path):
    """By the moving average that it is given; the features of the reference are found again by a later start."""
    run = build.run(config_of("pixels", shapes), tmp_path)
    shapes_of = jax.eval_shape(run.init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.01, np.float32), shapes_of)
    compiles = Compiles()
    first = run.judged.evaluate(params, run.frozen)
    assert compiles.new() > 1
    names = ("kid", "kid_std", "precision", "recall", "density", "coverage")
    assert set(first.scalars) == {f"evaluation/{name}" for name in names}
    (kept,) = (tmp_path / "reference").iterdir()
    assert run.judged.evaluate(params, run.frozen) == first
    other = jax.tree.map(lambda leaf: -leaf, params)
    assert run.judged.evaluate(other, run.frozen) != first
    assert compiles.new() == 0

    with np.load(kept) as file:
        arrays = dict(file)
    np.savez(kept, **arrays | {"vectors": arrays["vectors"] + 1})
    again = build.run(config_of("pixels", shapes), tmp_path).judged.evaluate(params, run.frozen)
    assert again.scalars["evaluation/kid"] != first.scalars["evaluation/kid"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pixels", "autoencoder", "text"])
def test_a_run_that_is_measured_trains_to_the_same_bits(kind, shapes, tmp_path):
    """Left alone, interrupted and resumed, or not measured at all; and the command finds the same of a checkpoint."""
    section = dict(metrics=("psnr", "ssim")) if kind == "autoencoder" else {}
    config = config_of(kind, shapes, **section)
    if kind == "autoencoder":
        del config.evaluation.subset
    states = {}
    for name in ("measured", "resumed", "plain"):
        workdir, asked = tmp_path / name, config.copy_and_resolve_references()
        if name == "plain":
            del asked.evaluation
        if name == "resumed":
            asked.steps = 2
            loop.train(build.run(asked, workdir), workdir)
            asked.steps = 4
        run = build.run(asked, workdir)
        assert loop.train(run, workdir) == 4
        states[name] = restored(run, workdir)
    assert_equal(states["measured"], states["plain"])
    assert_equal(states["measured"], states["resumed"])
    figure = "evaluation/psnr" if kind == "autoencoder" else "evaluation/kid"
    assert list(told(tmp_path / "measured", figure)) == [2, 4]
    assert told(tmp_path / "measured", figure) == told(tmp_path / "resumed", figure)
    assert losses(tmp_path / "measured") == losses(tmp_path / "plain")

    out = tmp_path / "out.json"
    names = ",".join(config.evaluation.metrics)
    argv = ["--workdir", tmp_path / "measured", "--metrics", names, "--n", 16, "--batch", 8]
    if kind != "autoencoder":
        argv += ["--features", shapes, "--kid_subset", 8]
    assert tiny.call("ldm_jax/evaluate", *argv, "--out", out) == 0
    found = json.loads(out.read_text())[figure.removeprefix("evaluation/")]
    assert found == pytest.approx(told(tmp_path / "measured", figure)[4], rel=2e-3, abs=2e-3)
