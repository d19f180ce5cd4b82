"""python -m ldm_jax.draw on a reduced folder of Stable Diffusion."""

import numpy as np
import pytest

from ldm_jax import draw, media
from ldm_jax.pretrained import from_pretrained
from tests import pretrained_folder as reduced
from tests import tiny
from tests.test_pretrained_edits import SMALL
from tests.tiny import quick_compiles  # noqa: F401 (a fixture of this module)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return reduced.write(tmp_path_factory.mktemp("draw") / "sd", **SMALL)


def test_every_verb_is_one_of_the_pipelines():
    for verb in draw.VERBS:
        assert callable(getattr(draw.Pretrained, verb))


@pytest.mark.slow
def test_pictures_are_those_of_the_verb(folder, tmp_path, capsys):
    given = ("--model", folder, "--set", "steps=2", "--set", "guidance=1.0", "--seed", 5)
    first = tmp_path / "text"
    assert tiny.call("ldm_jax/draw", *given, "--prompt", "a cat", "--n", 2, "--out", first) == 0
    pipe = from_pretrained(folder)
    expected = pipe.text_to_image(["a cat"] * 2, steps=2, guidance=1.0, seed=5)
    for i in (0, 1):
        path = first / f"0000{i}.png"
        assert np.abs(media.read_png(path) - media.to_uint8(expected[i]).astype(int)).max() <= 1
        about = media.read_png_text(path)
        assert (about["prompt"], about["seed"], about["set"]) == (
            "a cat",
            str(5 + i),
            "steps=2 guidance=1.0",
        )
    # Of that picture, in its own size, another one: as text, and as the verb.
    more = ("--verb", "image_to_image", "--image", first / "00000.png", "--set", "strength=0.5")
    assert tiny.call("ldm_jax/draw", *given, *more, "--prompt", "a dog", "--out", tmp_path) == 0
    x = media.read_png(first / "00000.png").astype(np.float32)[None] / 127.5 - 1
    expected = pipe.image_to_image(["a dog"], x, strength=0.5, steps=2, guidance=1.0, seed=5)
    drawn = media.read_png(tmp_path / "00000.png")
    assert np.abs(drawn - media.to_uint8(expected[0]).astype(int)).max() <= 1


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--verb", "paint"], "there is no verb 'paint'"),
        ([], "text_to_image needs ['prompt']"),
        (["--prompt", "a", "--set", "strength"], "is not of the form NAME=VALUE"),
        (["--prompt", "a", "--mask", "no.png"], "no.png"),
        (["--verb", "unconditional", "--prompt", "a"], "unconditional takes no 'prompt'"),
        (["--prompt", "a", "--set", "solver=ode"], "there is no solver 'ode'"),
        (["--prompt", "a", "--guide", "name=pga"], "there is no guidance 'pga'"),
        (["--prompt", "a", "--size", "3"], "must be two numbers"),
    ],
)
def test_what_is_refused(argv, says, folder, capsys, tmp_path):
    out = tmp_path / "out"
    assert tiny.call("ldm_jax/draw", "--model", folder, *argv, "--out", out) == 2
    assert says in capsys.readouterr().err
    assert not out.exists()
