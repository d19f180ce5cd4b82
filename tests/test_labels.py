"""How class-conditional models of `shapes` are judged."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import build
from ldm_jax.data import transforms
from ldm_jax.data.shapes import draw, scene, shapes_dataset_builder, vocabulary
from ldm_jax.diffusion import solvers
from ldm_jax.diffusion.process import Point
from ldm_jax.metrics.caption_reader import Claim
from ldm_jax.pipeline import Pipeline
from ldm_jax.quality import labels
from ldm_jax.tasks import Drawn, Sampling

SHAPES = vocabulary.SIMPLE.shapes
SAMPLING = Sampling(solvers.euler(), Point(*(jnp.ones(2),) * 3))


def examples(n):
    """Pictures and their classes, as the builder makes them."""
    world, found = vocabulary.SIMPLE, []
    for i in range(n):
        made = shapes_dataset_builder.example(world, "validation", i)
        image, _ = draw.render(scene.sample(world, "validation", i), world.shapes)
        found.append((image, made["label"]))
    images, names = zip(*found, strict=True)
    return np.stack(images), list(names)


def test_a_class_is_one_colour_and_shape():
    assert labels.classes_of(["red cross"]) == [Claim("red", "cross")]
    with pytest.raises(ValueError, match="'red cross and blue square' names 2 objects"):
        labels.classes_of(["red cross and blue square"])


def test_real_pictures_show_their_class_and_few_show_another():
    images, names = examples(40)
    claims = labels.classes_of(names)
    assert np.mean(labels.are_right(images, claims, SHAPES)) >= 0.95
    assert np.mean(labels.are_right(images, claims[1:] + claims[:1], SHAPES)) < 0.3


def test_the_figures_of_a_model_that_draws_half_of_its_classes(tmp_path):
    images, names = examples(12)
    real = transforms.to_unit(images)
    drawn = real.copy()
    drawn[6:] = 0.0  # grey: nothing is there

    class Model(Pipeline):
        def __init__(self):
            """No arrays."""

        def reconstruct(self, x):
            return x + 0.01

        def labels(self, given):
            assert given == names
            return given

        def drawer(self, sampling):
            def draw(conditions, seeds):
                assert seeds == list(range(7, 19))
                for i in range(0, 12, 4):
                    yield Drawn(drawn[i : i + 4])

            return draw

    figures = labels.figures(Model(), SAMPLING, real, names, 7, tmp_path)
    assert (
        figures["accuracy"]
        == np.mean(labels.are_right(images[:6], labels.classes_of(names[:6]), SHAPES)) / 2
    )
    assert figures["accuracy_real"] >= 0.9
    assert figures["accuracy_other"] < 0.3
    assert 30 < figures["psnr"] < 60
    assert (tmp_path / "evaluation_labels.png").is_file()


def test_a_model_without_classes_is_named():
    of = object.__new__(Pipeline)
    for name, value in (("classes", None), ("model", SimpleNamespace(fields=("tokens",)))):
        object.__setattr__(of, name, value)
    with pytest.raises(
        ValueError, match=r"the run in runs/text reads \['tokens'\], and this needs"
    ):
        build.labelled("runs/text", of, 4)
