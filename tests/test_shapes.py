"""The embedded data set: what is painted, what is said of it, and what TFDS reads back."""

import io
import itertools
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from ldm_jax.data import shapes
from ldm_jax.data.shapes import captions, draw, scene, shapes_dataset_builder, vocabulary
from ldm_jax.metrics import shape_reader

WORLDS = (vocabulary.SIMPLE, vocabulary.SCENES)
TINY = vocabulary.SIMPLE._replace(name="tiny", splits={"train": 30, "validation": 4, "unseen": 6})
worlds = pytest.mark.parametrize("world", WORLDS, ids=lambda w: w.name)


def scenes(world, split, n):
    return [scene.sample(world, split, i) for i in range(n)]


def pairs(seen):
    return {(t.colour, t.shape) for t in seen.things}


@worlds
def test_a_picture_is_a_pure_function_of_its_index(world):
    again = [scene.sample(world, "train", i) for i in reversed(range(20))]
    assert scenes(world, "train", 20) == again[::-1]
    assert len(set(again)) == 20
    assert scene.sample(world, "train", 3) != scene.sample(world, "validation", 3)
    first, second = (draw.render(again[0]) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@worlds
def test_only_the_unseen_split_has_the_held_out_pairs(world):
    seen = [pairs(s) for split in ("train", "validation") for s in scenes(world, split, 400)]
    assert not any(p & world.held_out for p in seen)
    assert all(pairs(s) & world.held_out for s in scenes(world, "unseen", 200))
    # Everything else is there, and so is every colour and every shape of what is held out.
    assert set().union(*seen) == set(world.pairs) - world.held_out
    for words in zip(*world.held_out, strict=True):
        assert len(set(words)) == len(words)  # no colour and no shape is held out twice


@worlds
def test_things_can_be_told_apart(world):
    overlaps = 0
    for seen in scenes(world, "train", 300):
        assert 1 <= len(seen.things) <= world.most
        assert len(pairs(seen)) == len(seen.things)
        _, all_of_it = draw.render(seen)
        assert (all_of_it > 0).any()
        for i, thing in enumerate(seen.things):
            ymin, xmin, ymax, xmax = draw.extent(thing)
            assert min(ymin, xmin) >= 0
            assert max(ymax, xmax) <= world.side
            _, alone = draw.render(seen._replace(things=(thing,)))
            later = [draw.render(seen._replace(things=(t,)))[1] for t in seen.things[i + 1 :]]
            hidden = (alone > 0) & np.any([m > 0 for m in later], axis=0) if later else alone < 0
            assert hidden.sum() <= 0.15 * (alone > 0).sum()
            overlaps += hidden.any()
    assert overlaps > 10


@pytest.mark.parametrize("shape", vocabulary.SHAPES)
@pytest.mark.parametrize("radius", [4.5, 13.0])
def test_coverage_has_the_area_and_the_box_of_the_shape(shape, radius):
    thing = draw.Thing(shape, "red", "small", 20.3, 19.6, radius)
    cover = draw.coverage(thing, 40)
    h, w = draw.HALF[shape]
    area = {
        "circle": np.pi,
        "square": 4 * h * w,
        "triangle": 2 * h * w,
        "diamond": 2 * h * w,
        "cross": 8 * draw.ARM - 4 * draw.ARM**2,
        "star": 5 * draw.STAR_TIP * draw.STAR_NOTCH * np.sin(np.pi / 5),
    }[shape]
    assert cover.sum() == pytest.approx(area * radius**2, rel=0.03)
    ys, xs = np.nonzero(cover > 0.2)
    seen = np.array([ys.min(), xs.min(), ys.max() + 1, xs.max() + 1])
    np.testing.assert_allclose(seen, draw.extent(thing), atol=1.5)


@pytest.mark.parametrize("kind", vocabulary.BACKDROPS)
def test_backgrounds_are_grey_and_textured_unless_plain(kind):
    contrast = 0.0 if kind == "plain" else 10.0
    image, segmentation = draw.render(
        draw.Scene(32, draw.Backdrop(kind, 100.0, contrast, 8.0, 0.5, 1), ())
    )
    assert (np.ptp(image, axis=2) == 0).all()
    assert (np.ptp(image) > 5) == (kind != "plain")
    assert abs(int(image.mean()) - 100) <= 5
    assert not segmentation.any()


def test_wrong_words_are_named():
    with pytest.raises(ValueError, match="no config 'nope'; choose one of"):
        shapes.prepare("nowhere", "nope")
    with pytest.raises(ValueError, match="no split 'test'; choose one of"):
        scene.sample(vocabulary.SIMPLE, "test", 0)
    with pytest.raises(ValueError, match="no shape 'blob'"):
        draw.coverage(draw.Thing("blob", "red", "small", 5.0, 5.0, 3.0), 10)
    with pytest.raises(ValueError, match="no backdrop 'foggy'"):
        draw.background(draw.Backdrop("foggy", 9.0, 9.0, 9.0, 0.0, 0), 10)


@worlds
@pytest.mark.parametrize("split", ["train", "unseen"])
def test_captions_are_true(world, split):
    """Against the scene, without the grammar: positions by the reader's rules, the rest by words."""
    sizes = {"little": "small", "big": "large"}
    for i, seen in enumerate(scenes(world, split, 400)):
        text, first = captions.describe(seen, scene.generator(world, split, i, use=1))
        truth = [
            shape_reader.Found(
                t.shape, t.colour, (t.y / seen.side, t.x / seen.side), 0.0, (0.0,) * 4
            )
            for t in seen.things
        ]
        claims = shape_reader.parse(text)
        assert shape_reader.matches(truth, claims), text
        named = seen.things[first]
        assert claims.objects[0][:2] == (named.colour, named.shape), text
        for size, colour, shape in re.findall(r"(small|little|medium|large|big) (\w+) (\w+)", text):
            (thing,) = [t for t in seen.things if (t.colour, t.shape) == (colour, shape)]
            assert thing.size == sizes.get(size, size), text
        said = (
            " ".join(re.findall(r"on a (.+) background|background is (.+)", text)[0]).split()
            if ("background" in text)
            else []
        )
        assert all(word == seen.backdrop.kind for word in said if word in vocabulary.BACKDROPS), (
            text
        )
        assert "dark" not in said or seen.backdrop.level < 97
        assert "light" not in said or seen.backdrop.level > 153
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|  |,,", text), text


def test_captions_vary():
    world = vocabulary.SIMPLE
    texts = [
        captions.describe(scene.sample(world, "train", i), scene.generator(world, "train", i, 1))[0]
        for i in range(6_500)  # a quarter of the split
    ]
    assert len(set(texts)) > 4_500
    claims = [shape_reader.parse(text) for text in texts[:1000]]
    placed = [any(o.place for o in c.objects) or bool(c.relations) for c in claims]
    assert 0.8 < np.mean(placed) < 0.98
    assert 0.1 < np.mean(["background" in text for text in texts]) < 0.4


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    builder = shapes_dataset_builder.Builder(
        data_dir=str(tmp_path_factory.mktemp("data")),
        config=shapes_dataset_builder.config(TINY),
        file_format="array_record",
    )
    builder.download_and_prepare()
    return str(builder.data_path)


def test_tfds_reads_back_what_was_painted(tiny):
    builder = tfds.builder_from_directory(tiny)
    assert {k: v.num_examples for k, v in builder.info.splits.items()} == TINY.splits
    assert tuple(builder.info.features["label"].names) == TINY.labels
    for split, n in TINY.splits.items():
        for i, record in zip(range(n), builder.as_data_source(split), strict=True):
            seen = scene.sample(TINY, split, i)
            image, segmentation = draw.render(seen, TINY.shapes)
            assert np.array_equal(record["image"], image)
            assert np.array_equal(record["segmentation"], segmentation)
            classes = {TINY.shapes[k - 1] for k in np.unique(segmentation[segmentation > 0])}
            assert classes == {t.shape for t in seen.things}
            boxes = record["boxes"]
            assert [TINY.shapes[k] for k in boxes["shape"]] == [t.shape for t in seen.things]
            assert [TINY.colours[k] for k in boxes["colour"]] == [t.colour for t in seen.things]
            expected = np.array([draw.extent(t) for t in seen.things]) / TINY.side
            np.testing.assert_allclose(np.stack(boxes["bbox"]), expected, atol=1e-6)
            claim = shape_reader.parse(record["caption"].decode()).objects[0]
            assert TINY.labels[record["label"]] == f"{claim.colour} {claim.shape}"


@pytest.mark.slow
def test_several_processes_paint_the_same_in_the_same_order(monkeypatch):
    builder = shapes_dataset_builder.Builder(data_dir="unused", config="simple")
    monkeypatch.setattr(builder.builder_config, "world", TINY)
    alone = list(builder._generate_examples("train"))
    monkeypatch.setattr(shapes_dataset_builder, "CHUNK", 2)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    together = list(builder._generate_examples("train"))
    for (i, a), (j, b) in zip(alone, together, strict=True):
        pictures = [example.pop("image").getvalue() for example in (a, b)]
        maps = [example.pop("segmentation").getvalue() for example in (a, b)]
        assert (i, pictures[0], maps[0], a) == (j, pictures[1], maps[1], b)


def test_segmentation_is_png_with_one_channel():
    record = shapes_dataset_builder.example(TINY, "train", 0)
    with Image.open(io.BytesIO(record["segmentation"].getvalue())) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "L", (32, 32))


def test_reading_needs_neither_this_package_nor_tensorflow(tiny):
    code = (
        "import sys, tensorflow_datasets as tfds\n"
        "source = tfds.builder_from_directory(sys.argv[1]).as_data_source('train[:50%]')\n"
        "assert len(source) == 15 and source[0]['image'].shape == (32, 32, 3)\n"
        "print(sorted({'ldm_jax', 'tensorflow', 'jax'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tiny], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_command_prepares_once_without_jax_or_tensorflow(tmp_path):
    code = (
        "import runpy, sys\n"
        "from ldm_jax.data.shapes import vocabulary\n"
        "small = vocabulary.SIMPLE._replace(splits={'train': 3, 'validation': 1, 'unseen': 1})\n"
        "vocabulary.WORLDS['simple'] = small\n"
        "runpy.run_module('ldm_jax.data.shapes', run_name='__main__', alter_sys=True)\n"
        "print(sorted({'tensorflow', 'jax'} & set(sys.modules)))\n"
    )
    command = [sys.executable, "-c", code, "--data_dir", str(tmp_path), "--config", "simple"]
    written = []
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True)
        *_, line, imported = done.stdout.strip().splitlines() or [done.stderr, ""]
        path = re.match(r"shapes/simple: (\S+) \(", line)
        assert path, done.stderr
        assert imported == "[]"
        files = sorted(pathlib.Path(path[1]).iterdir())
        written.append([(f.name, f.stat().st_mtime_ns) for f in files])
    assert written[0] == written[1]
    assert sum("array_record" in name for name, _ in written[0]) == 3


def test_palette_colours_have_hues_of_their_own():
    rgb = np.array(list(vocabulary.COLOURS.values()), float)
    chroma = rgb - rgb.mean(1, keepdims=True)
    unit = chroma / np.linalg.norm(chroma, axis=1, keepdims=True)
    angles = [np.degrees(np.arccos(a @ b)) for a, b in itertools.combinations(unit, 2)]
    assert min(angles) > 20
