"""Maps of classes and boxes as conditions of own models: from the data to the network, and the task semantic."""

import functools

import jax
import numpy as np
import pytest
from PIL import Image

from ldm_jax import build, media
from ldm_jax.build import conditioner, parts
from tests import tiny
from tests.tiny import quick_compiles  # noqa: F401 (a fixture of this module)


@functools.cache
def model():
    return build.pipeline(tiny.shared_model("semantic"))


@functools.cache
def sampling():
    return build.sampling(tiny.shared_model("semantic"), model())


def maps(*shape):
    return np.random.default_rng(0).integers(0, 4, shape)


@pytest.mark.slow
def test_a_map_is_drawn_at_its_own_size_by_one_network(tmp_path):
    batch, seeds, task, captions = build.ask(
        model(), sampling(), "semantic", maps=[maps(16, 16)], n=2, seed=3
    )
    assert (batch["segmentation"].shape, task.space, captions) == ((2, 16, 16, 1), None, [])
    (drawn,) = model().drawer(sampling())(batch, seeds, task=task)
    assert drawn.x.shape == (2, 16, 16, 3)
    wide = build.ask(model(), sampling(), "semantic", maps=[maps(16, 32)], seed=3)
    assert wide.task.space == (8, 16)
    (drawn,) = model().drawer(sampling())(*wide[:2], task=wide.task)
    assert drawn.x.shape == (1, 16, 32, 3)
    path = tmp_path / "map.png"
    Image.fromarray(maps(16, 32).astype(np.uint8)).save(path)
    flags = ("--workdir", tiny.shared_model("semantic"), "--out", tmp_path / "out")
    given = ("--task", "semantic", "--map", path, "--seed", 3)
    assert tiny.call("sample", *flags, *given) == 0
    written = media.read_png(tmp_path / "out" / "00000.png")
    np.testing.assert_allclose(written.astype(int), media.to_uint8(drawn.x[0]).astype(int), atol=1)


@pytest.mark.slow
def test_what_is_no_map(tmp_path):
    def ask(*of, **given):
        return build.ask(model(), sampling(), "semantic", maps=of, **given)

    with pytest.raises(ValueError, match=r"a map has the class 7, .* 4 classes \(0 to 3\)"):
        ask(np.full((16, 16), 7))
    with pytest.raises(ValueError, match="the nearest that works is 16x16"):
        ask(maps(16, 17))
    with pytest.raises(ValueError, match="the maps of 16x16 and 16x32 differ in size"):
        ask(maps(16, 16), maps(16, 32))
    with pytest.raises(ValueError, match="use the task semantic, with a map"):
        build.ask(model(), sampling())
    with pytest.raises(ValueError, match="the task semantic needs --map"):
        build.ask(model(), sampling(), "semantic")
    with pytest.raises(FileNotFoundError, match=r"there is no picture .*none\.png"):
        ask(tmp_path / "none.png")
    media.save_png(tmp_path / "colours.png", np.zeros((16, 16, 3), np.uint8))
    with pytest.raises(ValueError, match=r"the map .*colours\.png.*: a map of labels is \[h w\]"):
        ask(tmp_path / "colours.png")
    text = build.pipeline(tiny.shared_model("text"))
    with pytest.raises(ValueError, match="trained to read the field 'segmentation'"):
        build.ask(
            text, build.sampling(tiny.shared_model("text"), text), "semantic", maps=[maps(16, 16)]
        )


def test_a_map_with_more_classes_than_the_conditioner_stops_the_run():
    config = tiny.config_of("semantic")
    reading = dict(fields=("segmentation",), classes={"segmentation": range(-1, 2)})
    with pytest.raises(ValueError, match=r"\.png has the class [23] in its field 'segmentation'"):
        parts.validation_batches(config, **reading)


def test_boxes_are_read_by_a_transformer_of_their_own_words():
    config = tiny.config_of("layout")
    of = conditioner.conditioner(config, {})
    assert (of.vocab, of.length, of.pad, of.null) == (50, 8, 49, ())
    batch = parts.validation_batches(config, fields=of.fields)[0]
    assert batch["layout"].shape == (8, 8)
    shape = jax.eval_shape(
        lambda key: of.init_with_output(key, {"layout": batch["layout"]})[0], jax.random.key(0)
    )
    assert shape.tokens.shape == (8, 8, 8)
    assert conditioner.example(config, ("layout",), {})["layout"].shape == (1, 8)
    del config.data.layout
    with pytest.raises(ValueError, match=r"reads the field 'layout' and data\.layout is missing"):
        conditioner.conditioner(config, {})
    with pytest.raises(ValueError, match=r"is made of boxes by the section data\.layout"):
        parts.validation_batches(config, fields=("layout",))
