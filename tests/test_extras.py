"""What a user gives as boxes, or as pictures whose neighbours are looked up: rows of a batch, and errors."""

import functools
import json
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import build, media
from ldm_jax.build import boxes, extras
from ldm_jax.data import layout, neighbours, tfds_source
from ldm_jax.data.layout import Layout
from ldm_jax.diffusion import solvers
from ldm_jax.diffusion.process import Point
from ldm_jax.pipeline import Pipeline
from ldm_jax.quality.embedding import Embedding
from ldm_jax.tasks import Sampling
from tests import tiny
from tests.tiny import quick_compiles  # noqa: F401 (a fixture of this module)

SHAPES = Layout((("colour", 2), ("shape", 3)), objects=2, vocab=101 * 101 + 1, window=False)
KINDS = {"colour": ("red", "blue"), "shape": ("square", "triangle", "cross")}
IMAGES = Layout((("group", 2), ("label", 3)), objects=3, vocab=101 * 101 + 1)
NAMES = {"label": ("Cat", "Dog", "Traffic light")}
BOX = [0.1, 0.2, 0.6, 0.7]


def one(**given):
    return {"class": "red cross", "box": BOX} | given


def test_boxes_are_the_tokens_of_the_training_data():
    asked = [one(), one(**{"class": "blue square", "box": [0, 0.5, 1, 1]})]
    row = boxes.tokens(SHAPES, KINDS, asked)
    assert dict(layout.objects(SHAPES, row.tolist())) == {
        0 * 3 + 2: tuple(BOX),
        1 * 3 + 0: (0, 0.5, 1, 1),
    }
    as_data = {"bbox": np.array([BOX, [0, 0.5, 1, 1]]), "colour": [0, 1], "shape": [2, 0]}
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(row, layout.tokens(SHAPES, as_data, boxes.WHOLE, rng))


def test_entries_without_names_are_numbers():
    asked = [one(**{"class": "Dog"}), one(**{"class": "Traffic light", "group": 1})]
    row = boxes.tokens(IMAGES, NAMES, asked)
    assert {kind for kind, _ in layout.objects(IMAGES, row.tolist())} == {1, 3 + 2}
    assert row[-2:].tolist() == [0, 101 * 101 - 1]  # all of the picture is shown
    row = boxes.tokens(SHAPES, {}, [{"colour": 1, "shape": 2, "box": BOX}])
    assert layout.objects(SHAPES, row.tolist())[0][0] == 5


@pytest.mark.parametrize(
    ("kinds", "asked", "words"),
    [
        (KINDS, [one(**{"class": "red crass"})], "no class 'red crass'; did you mean 'red cross'"),
        (KINDS, [one(box=[0, 0, 1, 1.2])], r"\[0.0, 0.0, 1.0, 1.2\] .*lies outside of its picture"),
        (KINDS, [one(box=[0.5, 0, 0.4, 1])], "is upside down"),
        (KINDS, [one(box=[0, 0, 1])], "must be four numbers: ymin, xmin, ymax, xmax"),
        (KINDS, [one(box=[0, 0, 1, "1"])], "must be four numbers"),
        (KINDS, [one()] * 3, "3 boxes were given, and this model reads 1 to 2"),
        (KINDS, [], "0 boxes were given"),
        (KINDS, [one(bax=1)], "a box has the entry 'bax'; did you mean 'box'"),
        (KINDS, [{"box": BOX}], r"lacks 'class'; it needs \['class', 'box'\]"),
        ({}, [one()], "a box has the entry 'class'"),
        ({}, [{"colour": 1, "box": BOX}], "lacks 'shape'"),
        ({}, [{"colour": 2, "shape": 0, "box": BOX}], "has the colour 2"),
        ({}, [{"colour": "red", "shape": 0, "box": BOX}], "is 'red', and must be a whole number"),
    ],
)
def test_what_is_no_box(kinds, asked, words):
    with pytest.raises(ValueError, match=words):
        boxes.tokens(SHAPES, kinds, asked)


def test_of_many_classes_the_nearest_are_named():
    of = Layout((("label", 200),), objects=1, vocab=10_001)
    names = {"label": [f"thing {i}" for i in range(199)] + ["Tortoise"]}
    with pytest.raises(ValueError, match="did you mean 'Tortoise'") as caught:
        boxes.tokens(of, names, [one(**{"class": "Tortois"})])
    assert len(str(caught.value)) < 300


def test_files_of_boxes(tmp_path):
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps([one()]))
    assert boxes.read(path) == [one()]
    for text, words in (("[", "is no JSON"), ("{}", "must be a list"), ("[1]", "must be a list")):
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            boxes.read(path)
    with pytest.raises(FileNotFoundError, match="there is no file of boxes"):
        boxes.read(tmp_path / "none.json")


def test_the_data_tell_the_names_of_what_is_in_boxes(tmp_path):
    of = tfds_source.tfds("shapes/simple", tiny.simple_shapes(tmp_path, train=2))
    assert dict(of.kinds)["shape"] == ("square", "triangle", "cross")
    assert dict(of.kinds)["colour"][0] == "red"
    kept = {name: list(values) for name, values in of.kinds}
    build.workdir.claim(tiny.pixels(), of, tmp_path / "run")
    assert build.workdir.kinds(tmp_path / "run") == kept
    assert build.workdir.kinds(tmp_path / "none") == {}


class Known(Pipeline):
    """A model that is known by what it reads."""

    def __init__(self, fields, **values):
        values = (
            dict(model=SimpleNamespace(fields=fields), texts={}, common={}, size=(8, 8)) | values
        )
        for name, value in values.items():
            object.__setattr__(self, name, value)


SAMPLING = Sampling(solvers.euler(), Point(*(jnp.ones(2),) * 3))
OF_BOXES = Known(("layout",), boxes=functools.partial(boxes.tokens, SHAPES, KINDS))


def test_a_picture_is_asked_for_by_boxes(tmp_path):
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps([one()]))
    other = [one(**{"class": "blue cross"})]
    asked = build.ask(OF_BOXES, SAMPLING, boxes=[path, other], n=2, seed=5)
    rows = [OF_BOXES.boxes(given) for given in ([one()], [one()], other, other)]
    np.testing.assert_array_equal(asked.batch["layout"], rows)
    assert (asked.seeds, asked.captions) == ([5, 6, 7, 8], [])
    with pytest.raises(ValueError, match=r"give boxes: --boxes FILE\.json"):
        build.ask(OF_BOXES, SAMPLING)
    with pytest.raises(ValueError, match="the task panorama takes no --boxes"):
        build.ask(OF_BOXES, SAMPLING, "panorama", size=(8, 16), boxes=[other])
    with pytest.raises(ValueError, match="this model reads no boxes but"):
        build.ask(Known(("tokens",)), SAMPLING, boxes=[other])


@pytest.fixture
def index(tmp_path):
    """Of the corners of a cube, by their mean colours."""
    corners = np.array([[x, y, z] for x in (1, 9) for y in (1, 9) for z in (1, 9)], np.float32)
    path = tmp_path / "index.npz"
    neighbours.write(path, list("abcdefgh"), corners, 2, network="means")
    return path


def means(of):
    return np.stack([of.read(i).mean((0, 1)) for i in range(of.count)]).astype(np.float32)


MEANS = Embedding("means", None, means)


def test_a_picture_is_asked_for_by_its_neighbours(index, tmp_path):
    of = Known(("neighbours",), similar=functools.partial(extras.similar, str(index), 2))
    red = np.full((8, 8, 3), -1.0, np.float32)
    red[..., 0] = 1.0
    media.save_png(tmp_path / "red.png", media.to_uint8(red[:6, :]))
    given = dict(examples=[red, tmp_path / "red.png"], embedding=MEANS)
    asked = build.ask(of, SAMPLING, **given)
    found = neighbours.read(index)
    nearest = found.vectors[4].astype(np.float32)  # (9, 1, 1), of length 1
    assert asked.batch["neighbours"].shape == (2, 2, 3)
    np.testing.assert_array_equal(asked.batch["neighbours"][:, 0], [nearest, nearest])
    with pytest.raises(ValueError, match=r"give pictures whose neighbours are looked up: --exam"):
        build.ask(of, SAMPLING)
    with pytest.raises(ValueError, match="examples need what embeds them; give --features"):
        build.ask(of, SAMPLING, examples=[red])
    with pytest.raises(FileNotFoundError, match="there is no picture"):
        build.ask(of, SAMPLING, **given | dict(examples=[tmp_path / "none.png"]))
    with pytest.raises(ValueError, match="was made with another network"):
        build.ask(of, SAMPLING, **given | dict(embedding=MEANS._replace(network="others")))
    with pytest.raises(ValueError, match="reads no examples"):
        build.ask(OF_BOXES, SAMPLING, **given)


def test_networks_are_for_examples():
    assert build.embedding(None, None, []) is None
    with pytest.raises(ValueError, match="give --examples, or leave them out"):
        build.embedding(None, "shapes:F", [])
    with pytest.raises(ValueError, match="name one network"):
        build.embedding(None, None, ["a.png"])
    with pytest.raises(ValueError, match="there are no features 'inception'"):
        build.embedding(None, "inception", ["a.png"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["layout", "retrieval"])
def test_pictures_are_drawn_by_boxes_and_by_examples(kind, tmp_path):
    """The files' way through sample.py is that of the data's own rows."""
    workdir = tiny.shared_model(kind)
    pipe = build.pipeline(workdir)
    how = build.sampling(workdir, pipe)
    if kind == "layout":
        asked = [{"class": "green", "box": [0.25, 0.5, 0.75, 1]}]
        path = tmp_path / "boxes.json"
        path.write_text(json.dumps(asked))
        flags = ("--boxes", path)
        batch = {"layout": pipe.boxes(asked)[None]}
        assert batch["layout"][0, 0] == 1
    else:
        example = next(tiny.shared_pictures().glob("*.png"))
        flags = ("--examples", example, "--features", tiny.shared_features())
        by = build.embedding(None, tiny.shared_features(), [example])
        rows = pipe.similar([example], by, 16)
        batch = {"neighbours": rows}
        assert rows.shape == (1, 2, 64)
    (drawn,) = pipe.drawer(how)(batch, [3])
    out = ("--workdir", workdir, "--seed", 3, "--out", tmp_path / "out")
    assert tiny.call("sample", *out, *flags) == 0
    written = media.read_png(tmp_path / "out" / "00000.png")
    np.testing.assert_allclose(written.astype(int), media.to_uint8(drawn.x[0]).astype(int), atol=1)
