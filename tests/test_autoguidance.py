"""Autoguidance as users name it: which weaker model, what it changes, and which do not fit."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import build, guided
from ldm_jax.build import sampler, weaker
from ldm_jax.diffusion import samplers
from tests import tiny
from tests.test_pipeline_sampling import BLUE, RED, model
from tests.tiny import quick_compiles  # noqa: F401 (a fixture of this module)


def copied(tmp_path, change=None):
    """The tiny text model's run again, as another run."""
    run = tmp_path / "other"
    shutil.copytree(tiny.shared_model("text"), run)
    if change is not None:
        change(run)
    return run


def draw(how, **given):
    batch, seeds, task, _ = build.ask(model(), how, prompts=[RED, BLUE], **given)
    (drawn,) = model().drawer(how)(batch, seeds, task=task)
    return drawn.x


@pytest.mark.slow
def test_it_leads_away_from_the_weaker_model(tmp_path):
    """From the model itself nothing leads away, and only the difference to another is made larger."""
    workdir = tiny.shared_model("text")
    given = build.away_from(str(copied(tmp_path)), 3.0)
    how = build.sampling(workdir, model(), guidance=given)
    assert (how.guidance, how.how.name) == (3.0, "auto")
    plain = draw(build.sampling(workdir, model(), guidance=1.0))
    itself = dataclasses.replace(how, weak=model().params)
    np.testing.assert_allclose(draw(itself), plain, atol=1e-4)
    away, further = draw(how), draw(dataclasses.replace(how, guidance=4.0))
    assert np.abs(away - plain).max() > 1e-3
    assert np.abs(further - away).max() > 1e-3


@pytest.mark.slow
def test_it_is_the_weighted_sum_of_both_models():
    """Karras et al. 2024, eq. 5: w D(cond) + (1 - w) D_weak(cond), each under conditions of its own encoder."""
    of, strong = model().model, model().params
    weak = build.pipeline(tiny.shared_model("text")).params
    x = jax.random.normal(jax.random.key(0), (2, *model().shape))
    t, points = jnp.array([0.4, 0.9]), samplers.grid(of.path, 4)
    batch = model().prompts([RED, BLUE])
    conds = [of.condition(params, batch) for params in (strong, weak)]
    how, beside = guided.How("auto", weak=of), guided.Beside(weak=conds[1])
    made = guided.denoiser(of, how, strong | {"weak": weak}, beside, 3.0, {}, points)
    a, b = (of.denoiser(p)(x, t, c) for p, c in zip((strong, weak), conds, strict=True))
    np.testing.assert_allclose(made(x, t, conds[0]).x0, 3 * a.x0 - 2 * b.x0, atol=1e-4)


def test_a_flag_is_a_run_or_a_step():
    assert build.away_from("400") == {"name": "auto", "scale": 2.0, "checkpoint": 400}
    assert build.away_from("runs/a", 1.5) == {"name": "auto", "scale": 1.5, "run": "runs/a"}
    with pytest.raises(ValueError, match="give the work directory of one as run"):
        sampler.guidance(dict(name="auto", scale=2.0), 4)
    with pytest.raises(ValueError, match=r"sampler\.guidance\.runs is unknown; did you mean 'run'"):
        sampler.guidance(dict(name="auto", runs="a"), 4)


def other_path(run):
    config = json.loads((run / "config.json").read_text())
    config["path"]["name"] = "cosine"
    (run / "config.json").write_text(json.dumps(config))


def other_scale(run):
    kept = json.loads((run / "codec.json").read_text())
    (run / "codec.json").write_text(json.dumps(kept | {"scale": 2 * kept["scale"]}))


def other_autoencoder(run):
    kept = json.loads((run / "codec.json").read_text())
    (run / "codec.json").write_text(json.dumps(kept | {"step": kept["step"] + 1}))


def other_words(run):
    (run / "tokenizer.json").write_text((run / "tokenizer.json").read_text() + "\n")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_path, "differ in their path"),
        (other_scale, "differ in their scale of latents"),
        (other_autoencoder, "differ in their latents"),
        (other_words, "differ in their tokenizer"),
    ],
)
def test_runs_that_do_not_fit(change, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        weaker.check(tiny.shared_model("text"), model(), copied(tmp_path, change), model())


def test_a_model_is_no_weaker_than_itself():
    workdir = tiny.shared_model("text")
    with pytest.raises(ValueError, match=r"step 0 of .* is the model itself"):
        build.sampling(workdir, model(), guidance=build.away_from("0"))
    with pytest.raises(FileNotFoundError, match="holds no step 7"):
        build.sampling(workdir, model(), guidance=build.away_from("7"))
    with pytest.raises(FileNotFoundError, match="holds no run"):
        build.sampling(workdir, model(), guidance=build.away_from("runs/none"))


def test_what_autoguidance_does_not_go_with(tmp_path):
    how = build.sampling(
        tiny.shared_model("text"), model(), guidance=build.away_from(str(copied(tmp_path)))
    )
    with pytest.raises(ValueError, match="the task interpolate goes between two prompts"):
        build.ask(model(), how, "interpolate", prompts=[RED, BLUE])
    with pytest.raises(ValueError, match="and not from a negative prompt"):
        model().drawer(how)(model().prompts([RED]), [0], model().prompts([BLUE]))
