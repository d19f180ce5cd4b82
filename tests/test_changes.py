"""What an edit changed and kept: on pictures whose objects are known."""

import numpy as np

from ldm_jax.metrics import changes
from ldm_jax.metrics.shape_reader import Found


def found(shape, colour, y, x):
    return Found(shape, colour, (y, x), 0.1, (y - 0.1, x - 0.1, y + 0.1, x + 0.1))


KNOWN = [("red", "cross"), ("blue", "cross"), ("red", "square"), ("green", "triangle")]


def test_a_swap_changes_colour_or_shape_of_the_first_object():
    caption = "a red cross above a green triangle"
    colour, shape = (changes.swap(caption, KNOWN, number) for number in (0, 1))
    assert colour.caption == "a blue cross above a green triangle"
    assert shape.caption == "a red square above a green triangle"
    assert colour.kept == (("green", "triangle"),)
    assert changes.swap("a green triangle", KNOWN, 0) is None  # no other is known
    assert changes.swap("a red cross beside a red cross", KNOWN, 0) is None
    assert changes.pairs([caption]) == [("green", "triangle"), ("red", "cross")]


def test_an_object_stays_if_it_is_the_same_at_the_same_place():
    before = [found("cross", "red", 0.5, 0.5)]
    assert changes.stays(before, [found("cross", "red", 0.55, 0.5)], ("red", "cross"))
    assert not changes.stays(before, [found("cross", "red", 0.5, 0.7)], ("red", "cross"))
    assert not changes.stays(before, [found("square", "red", 0.5, 0.5)], ("red", "cross"))


def test_a_hole_is_the_box_and_its_margin():
    mask = changes.hole([found("cross", "red", 0.5, 0.5)], ("red", "cross"), (20, 20), 1)
    assert mask[7:13, 7:13].all()
    assert mask.sum() == 36
    assert changes.hole([], ("red", "cross"), (20, 20), 1) is None


def test_the_mass_within_a_box_counts_parts_of_positions():
    share, area = changes.inside(np.ones((4, 4)), (0.125, 0.0, 0.5, 0.5))
    assert share == area == 0.375 * 0.5
    heat = np.zeros((4, 4))
    heat[0, 0] = 2.0
    assert changes.inside(heat, (0.0, 0.0, 0.125, 1.0))[0] == 0.5
