"""Captions are read by rules on words: phrases that no template has written."""

import pytest

from ldm_jax.metrics import caption_reader

RED, BLUE, GREEN = ("red", "circle"), ("blue", "square"), ("green", "triangle")
ONE = {
    "a red circle": (),
    "A small RED circle, on the left": ("left",),
    "at the top left of the picture we see a red circle": ("top", "left"),
    "red circle (upper right corner)": ("top", "right"),
    "in the centre there is one tiny red circle on a striped light grey background": ("middle",),
    "a red circle in the bottom-right corner. the background is dark": ("bottom", "right"),
    "across a coloured field stands a red circle": (),
}
PLACED = {
    "a red circle on the left and a blue square on the right": (("left",), ("right",)),
    "on the left a red circle, on the right a blue square": (("left",), ("right",)),
    "on the left, a red circle, on the right, a blue square": (("left",), ("right",)),
    "on the left a red circle on the right a blue square": (("left",), ("right",)),
    "at the top a red circle and a blue square at the bottom": (("top",), ("bottom",)),
    "two shapes: a red circle, a blue square at the top": ((), ("top",)),
    "a red circle and a big blue square": ((), ()),
}
RELATED = {
    "a red circle left of a blue square": (0, "left", 1),
    "a red circle, to the right of a blue square": (0, "right", 1),
    "to the left of a red circle there is a blue square": (1, "left", 0),
    "below a red circle, a blue square": (1, "below", 0),
    "a red circle with a blue square to its right": (1, "right", 0),
    "a red circle and a blue square under it": (1, "below", 0),
    "a red circle and, left of it, a blue square": (1, "left", 0),
    "there is a red circle next  to a blue square": (0, "beside", 1),
}


@pytest.mark.parametrize("caption", ONE)
def test_one_object(caption):
    claims = caption_reader.parse(caption)
    assert claims == (((*RED, ONE[caption]),), ())


@pytest.mark.parametrize("caption", PLACED)
def test_places_go_to_their_objects(caption):
    first, second = PLACED[caption]
    assert caption_reader.parse(caption) == (((*RED, first), (*BLUE, second)), ())


@pytest.mark.parametrize("caption", RELATED)
def test_relations(caption):
    claims = caption_reader.parse(caption)
    assert claims == (((*RED, ()), (*BLUE, ())), (RELATED[caption],))


def test_three_objects():
    claims = caption_reader.parse(
        "a picture of a red circle above a blue square, and a green triangle at the top right"
    )
    assert claims.objects == ((*RED, ()), (*BLUE, ()), (*GREEN, ("top", "right")))
    assert claims.relations == ((0, "above", 1),)


@pytest.mark.parametrize(
    ("caption", "message"),
    [
        ("a photograph of a cat", "no object in the caption"),
        ("", "no object in the caption"),
        ("two red circles", "cannot judge 'circles'"),
        ("a brown circle", "cannot judge 'circle'"),
        ("a red circle left of a cat", "'left' in the caption .* relates nothing"),
        ("a red circle above it", "'above' in the caption .* relates nothing"),
    ],
)
def test_what_cannot_be_judged_is_said(caption, message):
    with pytest.raises(ValueError, match=message):
        caption_reader.parse(caption)
