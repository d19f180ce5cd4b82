"""Inpainting by a model that is trained for it: masks in the data, what the network sees, the task inpaint."""

import functools

import jax
import numpy as np
import pytest

from ldm_jax import build
from ldm_jax.build import parts
from ldm_jax.data import masks
from tests import tiny
from tests.test_tasks import pictures
from tests.tiny import quick_compiles  # noqa: F401 (a fixture of this module)

RED = "a red square"


def test_holes_are_boxes_within_the_picture():
    found = [masks.boxes((20, 30), np.random.default_rng(seed)) for seed in range(200)]
    assert {mask.shape for mask in found} == {(20, 30, 1)}
    assert {*np.unique(found)} == {0.0, 1.0}
    shares = np.array([mask.mean() for mask in found])
    assert shares.min() >= 0.1 * 0.1
    assert shares.max() < 1
    assert 0.1 < shares.mean() < 0.6
    reached = np.mean(found, axis=0)[..., 0]
    assert reached.min() > 0  # every position is made anew in some


def test_a_batch_has_the_same_holes_each_time():
    def holes(step, *kinds):
        config = tiny.config_of("painting")
        if kinds:
            config.data.holes = kinds
        source = parts.validation(config, fields=("hole", "masked"))
        batch = source[step]
        assert "masked" not in batch  # which the codec makes
        return batch["hole"]

    np.testing.assert_array_equal(holes(1), holes(1))
    assert np.abs(holes(1) - holes(0)).max() == 1
    margins = holes(1, "outpaint")
    assert not margins[:, 4:-4, 4:-4].any()
    assert np.abs(margins - holes(1)).max() == 1
    with pytest.raises(ValueError, match=r"no masks of \['thik'\]"):
        holes(0, "thin", "thik")


@functools.cache
def model():
    return build.pipeline(tiny.shared_model("painting"))


@functools.cache
def sampling():
    return build.sampling(tiny.shared_model("painting"), model())


def draw(x, mask):
    given = dict(prompts=[RED], images=[x], masks=[mask], seed=1)
    batch, seeds, task, _ = build.ask(model(), sampling(), "inpaint", **given)
    (drawn,) = model().drawer(sampling())(batch, seeds, task=task)
    return drawn.x[0]


@pytest.mark.slow
def test_it_sees_what_is_left_and_nothing_of_what_goes_away():
    of, arrays, key = model().model, model().arrays, jax.random.key(0)
    x, other = np.stack(pictures())
    mask = np.zeros((16, 16), np.float32)
    mask[4:10, 6:] = 1
    batch = {"x": x[None], "hole": mask[None, ..., None]}
    left = of.seen(arrays, batch, key)["masked"]
    changed = batch | {"x": np.where(mask[..., None] > 0, other, x)[None]}
    np.testing.assert_array_equal(of.seen(arrays, changed, key)["masked"], left)
    np.testing.assert_array_equal(left, of.codec.encode(arrays, x[None] * (1 - batch["hole"]), key))
    black = of._replace(blank=-1.0).seen(arrays, batch, key)["masked"]
    shown = np.where(mask[..., None] > 0, -1, x)[None].astype(np.float32)
    np.testing.assert_allclose(black, of.codec.encode(arrays, shown, key), atol=1e-6)
    words = model().prompts([RED], beside=of.fields)
    cond = of.condition(model().params, words | batch | {"masked": left})
    null = of.null(model().params, words | batch | {"masked": left})
    assert cond.spatial.shape == (1, 8, 8, 1 + 2)
    np.testing.assert_array_equal(null.spatial, cond.spatial)  # guidance is away from words alone
    assert np.abs(null.tokens - cond.tokens).max() > 1e-3


@pytest.mark.slow
def test_what_is_not_masked_stays_to_the_bit():
    x, other = pictures()
    mask = np.zeros((16, 16), np.float32)
    mask[4:10, 6:] = 1
    drawn = draw(x, mask)
    np.testing.assert_array_equal(drawn[mask == 0], x[mask == 0])
    assert np.abs(drawn - x)[mask == 1].max() > 1e-2
    # From pure noise with nothing left of the picture, nothing of it comes back.
    everything = np.ones((16, 16), np.float32)
    np.testing.assert_allclose(draw(x, everything), draw(other, everything), atol=1e-5)


@pytest.mark.slow
def test_it_draws_nothing_else():
    with pytest.raises(ValueError, match="was trained for the task inpaint"):
        build.ask(model(), sampling(), prompts=[RED])
    with pytest.raises(ValueError, match="leave --repaint out"):
        build.ask(
            model(),
            sampling(),
            "inpaint",
            prompts=[RED],
            images=pictures(1),
            masks=[np.ones((16, 16))],
            repaint=(2, 2),
        )
