"""Boxes as tokens: the corners of CompVis' own example, windows, mirrors, and what is no layout."""

import numpy as np
import pytest

from ldm_jax.data import layout
from ldm_jax.data.layout import Layout
from ldm_jax.data.transforms import BadImage, Window

WHOLE = Window((80, 40), (0, 0, 80, 40), flip=False)
LEFT = Window((80, 40), (0, 0, 40, 40), flip=False)


def row(of, boxes, view=WHOLE, seed=0, **kinds):
    boxes = {"bbox": np.array(boxes, np.float32).reshape(-1, 4), **kinds}
    return layout.tokens(of, boxes, view, np.random.default_rng(seed)).tolist()


def plain(**options):
    return Layout((("label", 5),), **{"objects": 2, "vocab": 17, "window": False} | options)


def test_corners_are_numbered_row_by_row():
    # Four sections: (x, y) = (2/3, 1/3) is token 6 and (1, 1) token 15, as in CompVis' docstring.
    assert row(plain(), [[1 / 3, 2 / 3, 1, 1]], label=[3]) == [3, 6, 15, 16, 16, 16]
    assert row(plain(), [], label=[]) == [16] * 6


def test_the_paper_s_layout_has_92_tokens_and_90_sections():
    of = Layout((("group", 2), ("label", 601)))
    assert (of.length, of.sections, of.none) == (92, 90, 8191)
    found = row(of, [[0, 0, 1, 0.5]], group=[1], label=[7])
    assert found[:3] == [601 + 7, 0, 89 * 90 + round(0.5 * 89)]
    assert found[3:-2] == [8191] * 87
    assert found[-2:] == [0, 8099]  # all of the picture is shown


def test_a_row_is_read_back():
    rng, of = np.random.default_rng(0), Layout((("label", 5),), objects=4, vocab=101 * 101 + 1)
    low = rng.uniform(0, 0.5, (3, 2))
    boxes = np.concatenate([low, low + rng.uniform(0.1, 0.5, (3, 2))], 1)
    found = layout.objects(of, row(of, boxes, label=[4, 0, 2]))
    assert {kind for kind, _ in found} == {4, 0, 2}
    for kind, box in found:
        np.testing.assert_allclose(box, boxes[[4, 0, 2].index(kind)], atol=0.5 / 100 + 1e-6)


def test_a_window_is_told_or_taken_into_account():
    of, box = Layout((("label", 5),), objects=1, vocab=101 * 101 + 1), [0, 0.1, 1, 0.8]
    told = row(of, [box], LEFT, label=[1])
    assert told[:3] == row(of, [box], label=[1])[:3]  # boxes are of the whole picture ...
    assert told[3:] == [0, 100 * 101 + 50]  # ... of which the left half is seen
    without = Layout(of.classes, objects=1, vocab=of.vocab, window=False)
    assert row(without, [box], LEFT, label=[1]) == row(without, [[0, 0.2, 1, 1]], label=[1])
    # What the window does not see is not there.
    assert row(without, [[0, 0.6, 1, 0.8]], LEFT, label=[1]) == [of.none] * 3


def test_a_mirror_turns_boxes_and_window():
    of, box = Layout((("label", 5),), objects=1, vocab=101 * 101 + 1), [0.2, 0.1, 0.4, 0.3]
    found = row(of, [box], LEFT._replace(flip=True), label=[1])
    assert found[:3] == row(of, [[0.2, 0.7, 0.4, 0.9]], label=[1])[:3]
    assert found[3:] == [50, 100 * 101 + 100]


def test_objects_stand_in_random_order_and_the_first_ones_are_taken():
    boxes = [[0, 0, 1, 1]] * 4
    orders = {tuple(row(plain(), boxes, seed=s, label=[0, 1, 2, 3])[::3]) for s in range(20)}
    assert orders == {(0, 1), (1, 0)}


@pytest.mark.parametrize("box", [[-0.1, 0, 1, 1], [0, 0, 1, 1.2], [0.5, 0, 0.4, 1]])
def test_a_box_outside_of_its_picture(box):
    with pytest.raises(BadImage, match=r"the box \[.*\] \(ymin, xmin, ymax, xmax\) lies outside"):
        row(plain(), [box], label=[0])


def test_what_is_no_layout():
    with pytest.raises(ValueError, match=r"has the label 5, and data.layout has 5 .*\(0 to 4\)"):
        row(plain(), [[0, 0, 1, 1]], label=[5])
    with pytest.raises(ValueError, match="the boxes have no 'label' but"):
        row(plain(), [[0, 0, 1, 1]], colour=[0])
    with pytest.raises(ValueError, match="no room in a vocabulary of 17"):
        Layout((("label", 17),), objects=2, vocab=17)
    with pytest.raises(ValueError, match="would be the token for no object; give 26"):
        Layout((("label", 5),), vocab=25)
