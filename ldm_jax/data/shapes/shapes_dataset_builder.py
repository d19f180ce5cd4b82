"""The TFDS builder of `shapes`: scenes, painted and described, written without tensorflow.

The files are array_record. Images are handed over as encoded PNG bytes, since TFDS needs tensorflow
to encode an array. Examples keep their order, so that record i of a split is `scene.sample(world,
split, i)`.
"""

import dataclasses
import functools
import io
import multiprocessing
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8
from PIL import Image

from ldm_jax.data.shapes import captions, draw, scene, vocabulary

VERSION = "2.0.0"  # of what is painted and said: raise it with every change of either
CHUNK = 250  # pictures that a process paints at once


@dataclasses.dataclass
class ShapesConfig(tfds.core.BuilderConfig):
    """A world as a builder config; TFDS fills the name in."""

    world: vocabulary.World = vocabulary.SIMPLE


def config(world: vocabulary.World) -> ShapesConfig:
    text = f"{world.side} x {world.side} pixels, at most {world.most} objects"
    return ShapesConfig(name=world.name, description=text, world=world)


def png(image: UInt8[np.ndarray, "h w c"]) -> io.BytesIO:
    """The picture as PNG, quickly rather than tightly packed."""
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(
        file, "PNG", compress_level=1
    )
    file.seek(0)
    return file


def example(world: vocabulary.World, split: str, index: int) -> dict[str, Any]:
    """One record; a pure function of its arguments."""
    seen = scene.sample(world, split, index)
    caption, first = captions.describe(seen, scene.generator(world, split, index, use=1))
    image, segmentation = draw.render(seen, world.shapes)
    named = seen.things[first]
    return {
        "image": png(image),
        "caption": caption,
        "label": f"{named.colour} {named.shape}",
        "boxes": [
            {
                "bbox": tfds.features.BBox(*np.clip(np.divide(draw.extent(t), seen.side), 0, 1)),
                "shape": t.shape,
                "colour": t.colour,
            }
            for t in seen.things
        ],
        "segmentation": png(segmentation),
    }


class Builder(tfds.core.GeneratorBasedBuilder):
    """Coloured shapes on grey backgrounds, with captions, boxes and segmentations."""

    VERSION = tfds.core.Version(VERSION)
    BUILDER_CONFIGS = [config(world) for world in vocabulary.WORLDS.values()]  # noqa: RUF012

    def _info(self) -> tfds.core.DatasetInfo:
        world = self.builder_config.world
        classes = tfds.features.ClassLabel
        side = world.side
        features = {
            "image": tfds.features.Image(shape=(side, side, 3), encoding_format="png"),
            "caption": tfds.features.Text(),
            # The colour and shape of the object that the caption names first.
            "label": classes(names=world.labels),
            # ymin, xmin, ymax, xmax in [0, 1] of whole objects, also of what is hidden; later
            # ones lie over earlier ones.
            "boxes": tfds.features.Sequence(
                {
                    "bbox": tfds.features.BBoxFeature(),
                    "shape": classes(names=world.shapes),
                    "colour": classes(names=world.colours),
                }
            ),
            # 0 is background, k + 1 the shape class k.
            "segmentation": tfds.features.Image(shape=(side, side, 1), encoding_format="png"),
        }
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(features),
            description=self.__doc__,
            supervised_keys=("image", "label"),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        return {split: self._generate_examples(split) for split in self.builder_config.world.splits}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        """In as many processes as there are cores, where there is enough to do for them."""
        world = self.builder_config.world
        make = functools.partial(example, world, split)
        indices = range(world.splits[split])
        cores = len(os.sched_getaffinity(0))
        if cores == 1 or len(indices) < 4 * CHUNK * cores:
            yield from enumerate(map(make, indices))
            return
        # Not forked: the parent may have threads.
        with multiprocessing.get_context("spawn").Pool(cores) as pool:
            yield from enumerate(pool.imap(make, indices, CHUNK))


def prepare(data_dir: str, name: str) -> str:
    """Write a config below `data_dir` unless it is there already; return its folder."""
    builder = Builder(data_dir=data_dir, config=name, file_format="array_record")
    builder.download_and_prepare()
    return str(builder.data_path)
