"""What gradients lead to: the judges, and pictures of our own models that follow them."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import build, towards
from ldm_jax.data.shapes import vocabulary
from ldm_jax.weights import shapes_classifier
from tests import tiny
from tests.test_pipeline_sampling import BLUE, RED, model
from tests.test_quality import random_network
from tests.tiny import quick_compiles  # noqa: F401 (a fixture of this module)


def test_a_classifier_wants_what_a_text_names_and_nothing_else(tmp_path):
    judge = towards.load(random_network(tmp_path / "shapes.safetensors"))
    world = vocabulary.SIMPLE
    rows = judge.wanted(["a red cross left of a blue square", "Three crosses, cyan"])
    kinds = np.array([*world.colours, *world.shapes])
    assert [set(kinds[row > 0]) for row in rows] == [{"red", "cross", "blue", "square"}, {"cyan"}]
    with pytest.raises(ValueError, match="'a cat' names none of"):
        judge.wanted(["a red cross", "a cat"])
    x = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 32, 32, 3)), jnp.float32)
    said = shapes_classifier.network(world).apply(judge.params, 127.5 * (x + 1)).present
    p = 1 / (1 + np.exp(-np.asarray(said, np.float64)))
    expected = np.log(np.where(rows > 0, p, 1 - p)).sum(-1)
    found = judge.log_p(judge.params, jnp.asarray(rows), x, jnp.zeros(2))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    again = towards.load(tmp_path / "shapes.safetensors")
    assert again.log_p is judge.log_p  # the same compiled program


def test_judges_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no judge"):
        towards.load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="holds no CLIP model"):
        towards.load(tmp_path)
    (tmp_path / "notes.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"notes\.safetensors"):
        towards.load(tmp_path / "notes.safetensors")


def redness(params, wanted, x, t):
    """How much of red a picture has, where that is wanted."""
    return params * wanted[:, 0] * (x[..., 0] - x[..., 1:].mean(-1)).mean((1, 2))


JUDGE = towards.Towards(
    redness, jnp.float32(1.0), lambda texts: np.array([["red" in t] for t in texts], np.float32)
)


@functools.cache
def sampling(**override):
    return build.sampling(tiny.shared_model("text"), model(), **dict(guidance=1.0) | override)


def draw(how, **given):
    batch, seeds, task, _ = build.ask(model(), how, prompts=[RED, BLUE], **given)
    (drawn,) = model().drawer(how)(batch, seeds, task=task)
    return drawn.x


@pytest.mark.slow
def test_pictures_follow_their_own_prompts_or_what_is_asked():
    plain, led = draw(sampling()), draw(sampling().led(JUDGE, 30.0))
    one = np.ones((2, 1), np.float32)
    values = [redness(1.0, one, x, None) for x in (led, plain)]
    assert values[0][0] > values[1][0] + 0.01
    np.testing.assert_allclose(led[1], plain[1], atol=1e-4)  # its prompt is of blue
    both = draw(sampling().led(JUDGE, 30.0), towards=["a red sky"])
    np.testing.assert_allclose(both[0], led[0], atol=1e-4)
    assert redness(1.0, one, both, None)[1] > values[1][1] + 0.01
    np.testing.assert_allclose(draw(sampling().led(JUDGE, 0.0)), plain, atol=1e-4)
    about = dict(sampling().led(JUDGE, 30.0).about)
    assert about["pull"] == "30.0"


def test_what_judges_do_not_go_with():
    how = sampling().led(JUDGE, 1.0)
    with pytest.raises(ValueError, match="--towards needs a network that judges"):
        draw(sampling(), towards=["red"])
    with pytest.raises(ValueError, match="the task interpolate goes between two prompts"):
        draw(how, task="interpolate")
    batch, seeds, _, _ = build.ask(model(), how, prompts=[RED, BLUE])
    with pytest.raises(ValueError, match=r"none were given; ask for the task by build\.ask"):
        model().drawer(how)(batch, seeds)
    other = dataclasses.replace(how, towards=JUDGE._replace(size=(32, 32)))
    with pytest.raises(
        ValueError, match=r"pictures of \(32, 32\), and this model draws \(16, 16\)"
    ):
        model().drawer(other)


def test_a_judge_of_pictures_of_another_size_is_told(tmp_path, capsys):
    path = random_network(tmp_path / "shapes.safetensors")
    given = ("--workdir", tiny.shared_model("text"), "--prompt", RED, "--judge", path)
    assert tiny.call("sample", *given) == 2
    assert "the judge reads pictures of (32, 32)" in capsys.readouterr().err
    assert tiny.call("sample", *given[:-1], tmp_path / "nothing") == 2
    assert "there is no judge" in capsys.readouterr().err
