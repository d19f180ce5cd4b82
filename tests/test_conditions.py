"""How a model's condition is judged on `shapes`, on pictures whose content is known."""

import functools
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import media
from ldm_jax.data import degradation, masks, transforms
from ldm_jax.data.shapes import draw, scene, shapes_dataset_builder, vocabulary
from ldm_jax.diffusion import solvers
from ldm_jax.diffusion.process import Point
from ldm_jax.metrics.caption_reader import Claim
from ldm_jax.pipeline import Pipeline
from ldm_jax.quality import boxes, conditions
from ldm_jax.tasks import Drawn, Sampling

WORLD = vocabulary.SIMPLE
SHAPES = WORLD.shapes


@functools.cache
def pictures(n=12, first=0):
    scenes = [scene.sample(WORLD, "validation", i) for i in range(first, first + n)]
    images, classes = zip(*(draw.render(of, SHAPES) for of in scenes), strict=True)
    return transforms.to_unit(np.stack(images)), np.stack(classes).astype(np.int32)


def test_a_picture_s_map_is_read_off_it():
    real, classes = pictures()
    found = conditions.mapped(real, real, {"segmentation": classes}, SHAPES).figures
    assert found["miou"] == found["miou_real"] > 0.9
    other = pictures(first=50)[0]
    assert conditions.mapped(real, other, {"segmentation": classes}, SHAPES).figures["miou"] < 0.5


def test_intersection_over_union():
    assert boxes.iou((0.0, 0.0, 1.0, 1.0), (0.0, 0.5, 1.0, 1.0)) == 0.5
    assert boxes.iou((0.0, 0.0, 0.5, 0.5), (0.5, 0.5, 1.0, 1.0)) == 0
    a, b = np.array([[[0, 0, 1, 1]]]), np.array([[[0, 1, 1, 1]]])
    assert conditions.mean_iou(a, b, 5) == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_boxes_are_right_where_the_objects_are_the_same():
    real, _ = pictures()
    same = conditions.placed(real, real, {}, SHAPES).figures
    assert same == dict(colour=1, right=1, iou=1, whole=1)
    other = conditions.placed(real, pictures(first=50)[0], {}, SHAPES).figures
    assert other["right"] < 0.3
    assert other["iou"] < 0.5
    moved = conditions.placed(real, np.roll(real, 4, axis=2), {}, SHAPES).figures
    assert moved["iou"] < 0.75


def test_holes_are_judged_within_and_around():
    real, _ = pictures()
    hole = np.stack(
        [masks.boxes((32, 32), np.random.default_rng(seed)) for seed in range(len(real))]
    )
    perfect = conditions.painted(real, real, {"hole": hole}, SHAPES).figures
    assert perfect["changed_outside"] == 0
    assert perfect["completed"] == 1
    assert perfect["objects"] > 2
    assert perfect["completed_mean"] < 0.9
    wrong = conditions.painted(real, -real, {"hole": hole}, SHAPES).figures
    assert wrong["changed_outside"] > 0.5
    assert wrong["psnr_inside"] < wrong["psnr_inside_mean"]
    assert wrong["completed"] < 0.3


def test_small_pictures_are_compared_with_bicubic_ones():
    real, _ = pictures()
    small = np.stack([transforms.to_unit(degradation.shrunk(x, 4)) for x in media.to_uint8(real)])
    found = conditions.enlarged(real, real + 0.02, {"small": small}, SHAPES)
    assert found.figures["psnr"] == pytest.approx(10 * np.log10(4 / 0.02**2), abs=1.5)
    assert 20 < found.figures["psnr_bicubic"] < 30
    bicubic = transforms.to_unit(found.shown)
    assert conditions.enlarged(real, bicubic, {"small": small}, SHAPES).figures["psnr_gain"] == 0


def test_neighbours_are_followed_where_most_of_them_agree():
    real, _ = pictures()
    bytes_, others = media.to_uint8(real), media.to_uint8(pictures(first=50)[0])
    near = [np.stack([a, a, a, b]) for a, b in zip(bytes_, others, strict=True)]
    found = conditions.retrieved(real, real, {"near": near}, SHAPES)
    assert found.figures["right"] == found.figures["right_real"] == found.figures["objects"] == 1
    assert found.figures["right_other"] < 0.3
    np.testing.assert_array_equal(found.shown, bytes_)
    drawn = real.copy()
    drawn[:6] = -1.0  # nothing is there
    assert conditions.retrieved(real, drawn, {"near": near}, SHAPES).figures["right"] == 0.5
    near[:6] = [np.zeros_like(of) for of in near[:6]]  # of which nothing can be said
    assert conditions.retrieved(real, drawn, {"near": near}, SHAPES).figures["right"] == 1
    assert conditions.common([frozenset("ab"), frozenset("a"), frozenset("ac")]) == frozenset("a")


def classes(n):
    """Pictures and the names of their classes, as the builder of the data makes them."""
    world, found = WORLD, []
    for i in range(n):
        made = shapes_dataset_builder.example(world, "validation", i)
        image, _ = draw.render(scene.sample(world, "validation", i), SHAPES)
        found.append((image, made["label"]))
    images, names = zip(*found, strict=True)
    return transforms.to_unit(np.stack(images)), list(names)


def test_a_class_is_one_colour_and_shape():
    assert conditions.claims_of(["red cross"]) == [Claim("red", "cross")]
    with pytest.raises(ValueError, match="'red cross and blue square' names 2 objects"):
        conditions.claims_of(["red cross and blue square"])
    with pytest.raises(ValueError, match="needs classes that have names"):
        conditions.claims_of(None)


def test_real_pictures_show_their_class_and_few_show_another():
    real, names = classes(40)
    found = conditions.classed(real, real, {"named": names}, SHAPES)
    assert found.figures["accuracy"] == found.figures["accuracy_real"] >= 0.95
    assert found.figures["accuracy_other"] < 0.3
    assert found.said == names


class Known(Pipeline):
    """A model whose samples are known."""

    def __init__(self, fields, drawn=None, classes=None):
        values = dict(model=SimpleNamespace(fields=fields), classes=classes, drawn=drawn)
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def drawer(self, sampling):
        def drawn(batch, seeds, task):
            assert set(batch) == {"label"}
            assert seeds == list(range(7, 19))
            for i in range(0, 12, 4):
                yield Drawn(self.drawn[i : i + 4])

        return drawn


def test_the_figures_of_a_model_that_draws_half_of_its_classes(tmp_path):
    real, names = classes(12)
    drawn = real.copy()
    drawn[6:] = 0.0  # grey: nothing is there
    known = sorted(set(names))
    batch = {"label": np.array([known.index(name) for name in names], np.int32)}
    sampling = Sampling(solvers.euler(), Point(*(jnp.ones(2),) * 3))
    of = Known(("label",), drawn, tuple(known))
    found = conditions.figures(of, sampling, real, batch, None, 7, tmp_path)
    half = conditions.classed(real[:6], real[:6], {"named": names[:6]}, SHAPES).figures
    assert found["accuracy"] == half["accuracy"] / 2
    assert (found["passed"], found["conditions"]) == (False, 12)
    assert found["accuracy_real"] >= 0.9
    assert (tmp_path / "evaluation_condition.png").is_file()


def test_models_that_cannot_be_judged_are_named():
    with pytest.raises(ValueError, match=r"this one reads \['tokens'\]; leave it out"):
        conditions.check(Known(("tokens",)), captions=True)
    with pytest.raises(ValueError, match="has no captions to tell which"):
        conditions.check(Known(("hole", "masked")), captions=False)
    assert conditions.check(Known(("hole", "masked")), captions=True) == "hole"
