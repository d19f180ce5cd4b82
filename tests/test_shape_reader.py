"""The reader of pictures: right on real ones, also blurred and noisy ones, and wrong on wrong ones."""

import ast
import pathlib

import numpy as np
import pytest
from scipy import ndimage

from ldm_jax.data.shapes import captions, draw, scene, vocabulary
from ldm_jax.metrics import caption_reader, shape_reader
from ldm_jax.metrics.shape_reader import agrees

GREY = draw.Backdrop("plain", 120.0, 0.0, 8.0, 0.0, 0)
LEFT, RIGHT = (16.0, 9.0), (16.0, 23.0)


def real(world, n, split="validation"):
    scenes = [scene.sample(world, split, i) for i in range(n)]
    said = [
        captions.describe(s, scene.generator(world, split, i, use=1))[0]
        for i, s in enumerate(scenes)
    ]
    return np.stack([draw.render(s)[0] for s in scenes]), said


def paint(*things):
    """A picture of (colour, shape, (y, x)) in 32 x 32 pixels."""
    made = [draw.Thing(shape, colour, "small", y, x, 5.0) for colour, shape, (y, x) in things]
    return draw.render(draw.Scene(32, GREY, tuple(made)))[0]


def test_reads_a_picture_that_is_painted_by_hand():
    image = np.full((40, 50, 3), 90, np.uint8)
    image[10:20, 5:15] = vocabulary.COLOURS["blue"]
    (found,) = shape_reader.read(image)
    assert (found.shape, found.colour) == ("square", "blue")
    np.testing.assert_allclose(found.box, (10 / 40, 5 / 50, 20 / 40, 15 / 50), atol=0.011)
    np.testing.assert_allclose(found.centre, (15 / 40, 10 / 50), atol=0.011)
    assert found.area == pytest.approx(100 / 2000)


@pytest.mark.parametrize(
    ("world", "n", "least"), [(vocabulary.SIMPLE, 100, 0.98), (vocabulary.SCENES, 40, 0.95)]
)
def test_agrees_with_real_pictures_and_with_other_captions_by_chance_only(world, n, least):
    images, said = real(world, n)
    assert shape_reader.accuracy(images, said) >= least
    found = [shape_reader.read(image) for image in images[: n // 2]]
    claims = [shape_reader.parse(caption) for caption in said]
    pairs = [(i, j) for i in range(n // 2) for j in range(n) if i != j]
    chance = np.mean([shape_reader.matches(found[i], claims[j]) for i, j in pairs])
    # One of 15 classes, at one of 5 places, if both have one object: less than 1 in 50.
    assert chance < 0.02


def test_agrees_with_blurred_and_noisy_pictures():
    images, said = real(vocabulary.SIMPLE, 100)
    soft = ndimage.gaussian_filter(images.astype(float), (0, 0.6, 0.6, 0))
    soft += np.random.default_rng(0).normal(0, 4, soft.shape)
    assert shape_reader.accuracy(np.clip(soft, 0, 255).astype(np.uint8), said) >= 0.97


@pytest.mark.parametrize("shape", vocabulary.SHAPES)
@pytest.mark.parametrize("colour", vocabulary.COLOURS)
def test_knows_every_class(colour, shape):
    (found,) = shape_reader.read(paint((colour, shape, (15.7, 16.2))))
    assert (found.colour, found.shape) == (colour, shape)
    np.testing.assert_allclose(found.centre, (15.7 / 32, 16.2 / 32), atol=0.02)


def test_partly_hidden_shapes_are_recognised():
    below, above = ("yellow", "square", (16.0, 11.0)), ("blue", "circle", (16.0, 19.5))
    assert agrees(paint(below, above), "a yellow square left of a blue circle")


def test_wrong_pictures_do_not_agree():
    caption = "a red circle on the left and a blue square on the right"
    red, blue = ("red", "circle", LEFT), ("blue", "square", RIGHT)
    assert agrees(paint(red, blue), caption)
    wrong = {
        "colours swapped": paint(("blue", "circle", LEFT), ("red", "square", RIGHT)),
        "wrong shape": paint(("red", "triangle", LEFT), blue),
        "wrong colour": paint(("green", "circle", LEFT), blue),
        "mirrored": paint(red, blue)[:, ::-1],
        "one is missing": paint(red),
        "one too many": paint(red, blue, ("green", "circle", (5.0, 16.0))),
        "nothing": paint(),
    }
    assert [name for name, image in wrong.items() if agrees(image, caption)] == []


@pytest.mark.parametrize(
    ("caption", "right", "wrong"),
    [
        ("a red circle {} a blue square", ("left of", "next to"), ("right of", "above", "below")),
        ("a red circle {}", (), ("on the left", "in the middle", "at the top")),
        ("a red circle {} and a blue square", ("", "on the left"), ("on the right", "at the top")),
    ],
)
def test_places_and_relations(caption, right, wrong):
    image = paint(("red", "circle", LEFT), ("blue", "square", RIGHT))
    assert [words for words in right if not agrees(image, caption.format(words))] == []
    assert [words for words in wrong if agrees(image, caption.format(words))] == []


def test_what_has_no_shape_has_none():
    image = np.full((32, 32, 3), 120, np.uint8)
    image[14:18, 2:30] = vocabulary.COLOURS["red"]  # a bar
    (found,) = shape_reader.read(image)
    assert found.shape is None
    assert not agrees(image, "a red square")


def test_specks_and_noise_are_no_objects():
    image = np.full((32, 32, 3), 120, np.uint8)
    assert shape_reader.read(image) == []
    image[4:6, 4:6] = vocabulary.COLOURS["red"]
    assert shape_reader.read(image) == []
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert all(found.shape is None for found in shape_reader.read(noise))


def test_bad_input_is_named():
    images = np.zeros((2, 8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match="2 pictures, 1 captions"):
        shape_reader.accuracy(images, ["a red circle"])
    with pytest.raises(ValueError, match="0 pictures, 0 captions"):
        shape_reader.accuracy(images[:0], [])
    with pytest.raises(ValueError, match="no object in the caption"):
        shape_reader.accuracy(images, ["a red circle", "a cat"])


def test_the_reader_shares_only_the_vocabulary_with_the_painter():
    for module in (shape_reader, caption_reader):
        tree = ast.parse(pathlib.Path(module.__file__).read_text())
        modules = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        ours = {name for name in modules if name.startswith("ldm_jax.data")}
        assert ours == {"ldm_jax.data.shapes.vocabulary"}


def test_only_shapes_that_may_be_there_are_found():
    captions = ["a red cross", "a blue square over a green cross"]
    assert shape_reader.named(captions) == ("square", "cross")
    image = paint(("red", "diamond", (15.7, 16.2)))
    assert [found.shape for found in shape_reader.read(image)] == ["diamond"]
    assert [found.shape for found in shape_reader.read(image, ("diamond", "star"))] == ["diamond"]
    assert not shape_reader.agrees(image, "a red cross")
    (found,) = shape_reader.read(image, ("square", "triangle"))
    assert found.shape != "diamond"
