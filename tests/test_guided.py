"""Guidance as users name it: in a config, by flags, in the pipeline; what compiles anew and what is refused."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from ldm_jax import build, guided
from ldm_jax.build import sampler
from ldm_jax.diffusion import guidance, samplers
from tests import tiny
from tests.test_pipeline_sampling import BLUE, RED, model
from tests.tiny import quick_compiles  # noqa: F401 (a fixture of this module)

WHERE = "sampler.guidance"


def test_a_number_is_a_scale():
    assert sampler.guidance(2.5, 4) == (2.5, guided.How("cfg"), {})
    assert sampler.guidance(dict(name="pag"), 4) == (
        1.0,
        guided.How("pag", ("mid",)),
        {"strength": 3.0},
    )
    given = dict(name="zero_star", scale=4, interval=[0.1, 0.7], two_passes=True)
    scale, how, numbers = sampler.guidance(given, 4)
    assert (scale, how) == (4.0, guided.How("zero_star", two_passes=True))
    assert numbers == {"zero_steps": 1, "interval": (0.1, 0.7)}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(name="cgf"), "there is no guidance 'cgf'; did you mean 'cfg'"),
        (dict(scale=2.0), "lacks a name"),
        (dict(name="cfg", scal=2.0), "sampler.guidance.scal is unknown; did you mean 'scale'"),
        (dict(name="cfg", eta=0.1), "sampler.guidance.eta is unknown"),
        (dict(name="cfg", scale="2"), "wrong type; expected float"),
        (dict(name="cfg", rescale=1.5), "rescale = 1.5 is out of range; give it from 0 to 1"),
        (dict(name="cfg", interval=(0.7, 0.2)), "a lower and a higher time"),
        (dict(name="cfg", threshold=99.5), "threshold = 99.5 is out of range"),
        (dict(name="cfg", limit=2.0), "beside a threshold"),
        (dict(name="zero_star", zero_steps=4), "less than the 4 steps"),
        (dict(name="sag", two_passes=True), "sag has no two passes to choose"),
    ],
)
def test_what_guidance_cannot_be(given, words):
    with pytest.raises(ValueError, match=words):
        sampler.guidance(given, 4)


def model_sampling(**override):
    return build.sampling(tiny.shared_model("text"), model(), **override)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in guided.KINDS if kind != "auto"])
def test_every_kind_has_the_shape_of_the_model(kind):
    """Traced with common options; nothing is compiled."""
    of, b = model().model, 2
    common = dict(rescale=0.5, threshold=0.99, limit=2.0)
    if kind == "cfg":
        common["interval"] = (0.2, 0.8)
    if "blocks" in guided.KINDS[kind]:
        common["blocks"] = ("down_1",)
    for scale in (1.0, 3.0) if kind == "pag" else (3.0,):
        _, how, numbers = sampler.guidance(dict(name=kind, scale=scale, **common), 4)

        def denoise(x, params, batch, how=how, numbers=numbers, scale=scale):
            null = None if scale == 1.0 else of.null(params, batch)
            points = samplers.grid(of.path, 4)
            made = guided.denoiser(of, how, params, guided.Beside(null), scale, numbers, points)
            return made(x, jnp.full(b, 0.5), of.condition(params, batch))

        x = jnp.zeros((b, *model().shape))
        got = jax.eval_shape(denoise, x, model().params, model().prompts([RED, BLUE]))
        assert got.x0.shape == got.eps.shape == x.shape


@pytest.mark.slow
def test_perturbed_attention_beside_guidance():
    """The scales are as in Ahn et al. 2024: null + w (cond - null) + s (cond - perturbed)."""
    of, params = model().model, model().params
    x = jax.random.normal(jax.random.key(0), (2, *model().shape))
    t, points = jnp.array([0.4, 0.9]), samplers.grid(of.path, 4)
    how, numbers = guided.How("pag", ("down_1",)), {"strength": 2.0}

    @jax.jit
    def run(params, batch):
        cond, null = of.condition(params, batch), of.null(params, batch)
        both = guided.denoiser(of, how, params, guided.Beside(null), 3.0, numbers, points)
        alone = guided.denoiser(of, how, params, guided.Beside(), 1.0, numbers, points)
        plain = of.denoiser(params)
        four = (both, guidance.cfg(plain, null, 3.0), alone, plain)
        return [made(x, t, cond) for made in four]

    both, plain, alone, itself = run(params, model().prompts([RED, BLUE]))
    assert np.abs(alone.eps - itself.eps).max() > 1e-4
    np.testing.assert_allclose(both.eps - plain.eps, alone.eps - itself.eps, rtol=1e-2, atol=1e-4)


@pytest.mark.slow
def test_numbers_and_words_compile_nothing(caplog):
    def how():
        section = dict(name="cfg", scale=3.0, rescale=0.5, threshold=0.99)
        return model_sampling(steps=2, heatmaps=True, guidance=section)

    def draw(how, prompts, seeds, negative):
        (drawn,) = model().drawer(how)(
            model().prompts(prompts), seeds, model().prompts([negative] * len(prompts))
        )
        return drawn

    first = how()
    others = {"rescale": 0.1, "threshold": 0.9}
    second = dataclasses.replace(first, guidance=5.0, numbers=others)
    drawn = draw(first, [RED, BLUE], [0, 1], "")
    caplog.clear()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        other = draw(second, [BLUE, BLUE], [0, 1], "a green square")
    names = [r.getMessage() for r in caplog.records]
    compiled = [n.split()[4] for n in names if n.startswith("Finished XLA compilation of")]
    assert compiled == []
    assert drawn.maps.shape == (2, 8, 8, 8)  # of latents and tokens
    np.testing.assert_allclose(drawn.maps.sum(-1), 1, rtol=1e-4)
    assert np.abs(other.x[1] - drawn.x[1]).max() > 1e-4
    again = draw(first, [BLUE, BLUE], [0, 1], "a green square")
    assert np.abs(again.x[1] - drawn.x[1]).max() > 1e-5  # the negative prompt alone is another
    with pytest.raises(ValueError, match="a guidance of 1 is none"):
        draw(dataclasses.replace(first, guidance=1.0), [RED], [0], "")


@pytest.mark.slow
def test_a_model_that_never_saw_the_null_condition_is_told(caplog):
    config = tiny.config_of("text")
    of = model().model
    with caplog.at_level(logging.WARNING):
        sampler.sampling(config, of)
        assert not caplog.records
        for drop in (0.0, ConfigDict({"tokens": 0.0})):
            del config.objective.drop
            config.objective.drop = drop
            sampler.sampling(config, of, guidance=1.0)
            assert not caplog.records
            sampler.sampling(config, of)
            assert "never seen (objective.drop = 0)" in caplog.records[-1].getMessage()
            caplog.clear()


@pytest.mark.slow
def test_a_number_changes_the_scale_of_a_section():
    config = tiny.config_of("text")
    del config.sampler.guidance
    config.sampler.guidance = dict(name="apg", scale=3.0, radius=2.0)
    for override, scale in (({}, 3.0), (dict(guidance=6), 6.0)):
        how = sampler.sampling(config, model().model, **override)
        assert how.guidance == scale
        assert (how.how.name, how.numbers) == ("apg", {"eta": 0.0, "radius": 2.0})
    assert dict(how.about)["guidance"] == "{'name': 'apg', 'radius': 2.0, 'scale': 6.0}"
