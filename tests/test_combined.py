"""Several prompts in one: how they are written, what they draw, what cannot be."""

import functools

import numpy as np
import pytest

from ldm_jax import build
from ldm_jax.combined import combined
from tests import tiny
from tests.test_pipeline_sampling import BLUE, RED, model
from tests.tiny import quick_compiles  # noqa: F401 (a fixture of this module)


def test_captions_are_cut_at_the_words_between():
    alone = combined([RED, "AND it ANDs: 3"])
    assert (alone.how, alone.columns) == (None, [[RED, "AND it ANDs: 3"]])
    both = combined(["a red square AND a star:0.5 AND b : -2", BLUE, ""])
    assert both.how == "AND"
    assert both.columns == [["a red square", BLUE, ""], ["a star", "", ""], ["b", "", ""]]
    np.testing.assert_array_equal(both.weights, [[1, 0.5, -2], [1, 0, 0], [1, 0, 0]])
    between = combined(["a:1 BLEND b:3"])
    assert (between.how, between.columns) == ("BLEND", [["a"], ["b"]])
    np.testing.assert_array_equal(between.weights, [[1, 3]])


@pytest.mark.parametrize(
    ("captions", "words"),
    [
        (["a AND b", "a BLEND b"], "AND and BLEND cannot be mixed"),
        (["a AND :2"], "'a AND :2' has a part without words beside its AND"),
        (["a:-1 BLEND b"], "weights of 'a:-1 BLEND b' are shares"),
        (["a:0 BLEND b:0"], "are shares of its parts; give numbers from 0 on"),
    ],
)
def test_what_captions_cannot_say(captions, words):
    with pytest.raises(ValueError, match=words):
        combined(captions)


@functools.cache
def sampling(**override):
    return build.sampling(tiny.shared_model("text"), model(), **override)


def draw(prompts, how=None, **given):
    how = how or sampling()
    batch, seeds, task, captions = build.ask(model(), how, prompts=prompts, seed=3, **given)
    assert captions == prompts
    (drawn,) = model().drawer(how)(batch, seeds, task=task)
    return drawn.x


@pytest.mark.slow
def test_a_combination_with_nothing_else_is_its_first_prompt():
    plain = draw([RED, BLUE])
    for word in ("AND", "BLEND"):
        drawn = draw([f"{RED} {word} {BLUE}:0", BLUE])
        np.testing.assert_allclose(drawn, plain, atol=1e-5)
        mixed = draw([f"{RED} {word} {BLUE}", f"{BLUE} {word} {BLUE}:1"])
        assert np.abs(mixed[0] - plain[0]).max() > 1e-4
    # The mean of a prompt with itself is the prompt, and twice its guided difference is twice the scale.
    np.testing.assert_allclose(mixed[1], plain[1], atol=1e-5)
    twice = draw([f"{RED} AND {RED}"], sampling(guidance=2.0))
    np.testing.assert_allclose(twice, draw([RED], sampling(guidance=4.0)), atol=1e-4)


@pytest.mark.parametrize(
    ("how", "given", "words"),
    [
        ({}, dict(task="interpolate"), "the task interpolate takes one prompt, and AND combines"),
        (dict(heatmaps=True), {}, "heat maps show one prompt"),
        (dict(guidance=dict(name="apg", scale=2.0)), {}, "AND is guidance of its own and takes no"),
        (dict(guidance=dict(name="cfg", scale=2.0, rescale=0.5)), {}, "takes no rescale; use cfg"),
    ],
)
def test_what_combinations_do_not_go_with(how, given, words):
    how = build.sampling(tiny.shared_model("text"), model(), **how)
    with pytest.raises(ValueError, match=words):
        build.ask(model(), how, prompts=["a AND b"], **given)
