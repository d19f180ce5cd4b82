"""Masks: what each kind covers, that none is empty, and that they are a function of the generator alone."""

import numpy as np
import pytest
from scipy import ndimage

from ldm_jax.data import masks

SIZE = (64, 96)


def drawn(kind, n=100, size=SIZE):
    return np.stack([masks.KINDS[kind](size, np.random.default_rng(seed)) for seed in range(n)])


def test_a_stroke_is_a_rectangle_with_two_half_discs():
    mask = np.zeros((80, 120), np.float32)
    masks.paint(mask, np.array([40.0, 30.0]), np.array([40.0, 90.0]), 10.0)
    assert mask.sum() == pytest.approx(60 * 20 + np.pi * 100, rel=0.01)
    assert mask[31:49, 30:90].all()
    assert not mask[:, :20].any()
    turned = np.zeros((120, 80), np.float32)
    masks.paint(turned, np.array([90.0, 40.0]), np.array([30.0, 40.0]), 10.0)
    np.testing.assert_array_equal(turned, mask.T)
    beyond = np.zeros((8, 8), np.float32)
    masks.paint(beyond, np.array([0.0, 0.0]), np.array([0.0, 0.0]), 3.0)
    assert beyond.sum() == np.sum(
        (np.arange(8)[:, None] + 0.5) ** 2 + (np.arange(8) + 0.5) ** 2 <= 9
    )


@pytest.mark.parametrize("kind", masks.KINDS)
def test_a_mask_is_0_and_1_and_never_empty(kind):
    found = drawn(kind)
    assert found.shape == (100, *SIZE, 1)
    assert {*np.unique(found)} == {0.0, 1.0}
    assert found.any((1, 2, 3)).all()
    np.testing.assert_array_equal(found[:5], drawn(kind, 5))
    assert len({mask.tobytes() for mask in found}) > 90
    assert drawn(kind, 20, (8, 8)).any((1, 2, 3)).all()  # however small the picture


def test_strokes_are_thick_medium_and_thin_at_every_size():
    def widest(mask):
        return ndimage.distance_transform_edt(np.pad(mask[..., 0], 1)).max() / min(mask.shape[:2])

    widths = {kind: np.median([widest(m) for m in drawn(kind, 30)]) for kind in masks.STROKES}
    assert 0.3 > widths["thick"] > 1.3 * widths["medium"] > 1.6 * widths["thin"] > 0.03
    for kind in masks.STROKES:
        share = drawn(kind).mean()
        assert 0.1 < share < 0.5
        assert drawn(kind, 40, (160, 240)).mean() == pytest.approx(share, abs=0.08)
    reached = drawn("thin", 200).mean(0)
    assert reached.min() > 0.02  # every position is made anew in some


def test_outpainting_leaves_the_middle_and_takes_every_side_in_turn():
    found = drawn("outpaint")[..., 0]
    h, w = SIZE
    assert not found[:, h // 4 : h - h // 4, w // 4 : w - w // 4].any()
    sides = (
        np.stack([found[:, 0], found[:, -1]]).all(-1),
        np.stack([found[..., 0], found[..., -1]]).all(-1),
    )
    for there in (*sides[0], *sides[1]):
        assert 0.4 < there.mean() < 0.8
    assert 0.04 < found.mean() < 0.4


def test_a_kind_that_is_named_twice_is_drawn_twice_as_often():
    def is_margin(seed):
        mask = masks.hole(("outpaint", "outpaint", "thin"), SIZE, np.random.default_rng(seed))
        return not mask[20:44, 30:66].any() and mask[[0, -1]].all((1, 2)).any()

    share = np.mean([is_margin(seed) for seed in range(200)])
    assert 0.4 < share < 0.75  # two thirds, of which five sixths have a margin at top or bottom
    with pytest.raises(ValueError, match=r"no masks of \['thik'\]; choose of \('thick'"):
        masks.hole(("thik",), SIZE, np.random.default_rng(0))
    with pytest.raises(ValueError, match="no masks of no kind"):
        masks.check(())
