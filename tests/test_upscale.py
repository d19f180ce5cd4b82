"""Super-resolution by a model of one's own: the small picture as a field of the data, and the task upscale."""

import functools

import jax
import numpy as np
import pytest

from ldm_jax import build, media
from ldm_jax.build import parts
from ldm_jax.data import degradation, transforms
from tests import tiny
from tests.test_tasks import pictures
from tests.tiny import quick_compiles  # noqa: F401 (a fixture of this module)


def test_a_smaller_picture_keeps_means_and_does_not_alias():
    flat = np.full((16, 16, 3), 100, np.uint8)
    np.testing.assert_array_equal(degradation.shrunk(flat, 4), 100)
    lines = np.zeros((16, 16, 3), np.uint8)
    lines[:, ::2] = 255  # finer than the small picture can show
    small = transforms.to_unit(degradation.shrunk(lines, 4))
    assert small.shape == (4, 4, 3)
    np.testing.assert_allclose(small[:, 1:-1], 0, atol=0.05)


def test_the_field_is_the_batch_s_picture_made_smaller():
    batch = parts.validation_batches(tiny.config_of("upscale"), fields=("small",))[0]
    pixels = media.to_uint8(batch["x"])
    wanted = np.stack([transforms.to_unit(degradation.shrunk(x, 2)) for x in pixels])
    np.testing.assert_allclose(batch["small"], wanted, atol=1e-6)
    config = tiny.config_of("upscale")
    config.data.degradation = "bsr"
    worse = parts.validation_batches(config, fields=("small",))[0]
    np.testing.assert_array_equal(worse["x"], batch["x"])
    assert np.abs(worse["small"] - batch["small"]).mean() > 0.01


@pytest.mark.parametrize("shrink", [None, 3])
def test_a_field_that_cannot_be_made_is_told(shrink):
    config = tiny.config_of("upscale")
    if shrink is None:
        del config.data.shrink
    else:
        config.data.shrink = shrink
    with pytest.raises(ValueError, match=r"give data\.shrink, a whole number from 2 on"):
        parts.validation_batches(config, fields=("small",))


@functools.cache
def model():
    return build.pipeline(tiny.shared_model("upscale"))


@functools.cache
def sampling(**override):
    return build.sampling(tiny.shared_model("upscale"), model(), **override)


def small(n=2, size=8):
    return [picture[:size, :size] for picture in pictures(n)]


@pytest.mark.slow
def test_small_pictures_are_made_larger(tmp_path):
    batch, seeds, task, captions = build.ask(model(), sampling(), "upscale", images=small(), n=2)
    np.testing.assert_array_equal(batch["small"], np.stack(small()).repeat(2, 0))
    assert captions == []
    (drawn,) = model().drawer(sampling())(batch, seeds, task=task)
    assert drawn.x.shape == (4, 16, 16, 3)
    # Larger ones are drawn in windows, each of which sees its own piece of the small picture.
    wide = build.ask(model(), sampling(), "upscale", images=[np.tile(small(1)[0], (1, 2, 1))])
    assert wide.task.space == (model().shape[0], 2 * model().shape[1])
    (drawn,) = model().drawer(sampling())(*wide[:2], task=wide.task)
    assert drawn.x.shape == (1, 16, 32, 3)
    media.save_png(tmp_path / "a.png", media.to_uint8(small(1)[0]))
    flags = ("--workdir", tiny.shared_model("upscale"), "--out", tmp_path / "out")
    assert tiny.call("sample", *flags, "--task", "upscale", "--image", tmp_path / "a.png") == 0
    assert media.read_png(tmp_path / "out" / "00000.png").shape == (16, 16, 3)


@pytest.mark.slow
def test_every_position_reads_the_small_picture():
    """The condition is on the latents' grid and not a vector: nothing of it is lost."""
    batch = build.ask(model(), sampling(), "upscale", images=small()).batch
    cond = jax.eval_shape(model().model.condition, model().params, batch)
    assert cond.spatial.shape == (2, *model().shape[:-1], 3)


@pytest.mark.slow
def test_what_is_no_model_or_no_picture_for_upscaling():
    text = build.pipeline(tiny.shared_model("text"))
    how = build.sampling(tiny.shared_model("text"), text)
    with pytest.raises(ValueError, match="for models that were trained to read the field 'small'"):
        build.ask(text, how, "upscale", prompts=["a"], images=small(1))
    with pytest.raises(ValueError, match="the nearest that works is 16x16"):
        build.ask(model(), sampling(), "upscale", images=[small(1)[0][:6, :6]])
    with pytest.raises(ValueError, match="was trained for the task upscale"):
        build.ask(model(), sampling())
    with pytest.raises(ValueError, match="the task upscale needs --image"):
        build.ask(model(), sampling(), "upscale")
