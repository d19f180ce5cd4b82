"""`shapes`, the embedded data set: coloured shapes on grey backgrounds, with true captions.

    python -m ldm_jax.data.shapes --data_dir DIR --config simple

A picture is a pure function of (config, split, index): `scene.sample` draws what is in it,
`captions.describe` says it, `draw.render` paints it, and `shapes_dataset_builder.Builder` writes it
as a TFDS data set without tensorflow. Reading it back needs none of this code:
`tfds.builder_from_directory(path).as_data_source(split)`.
"""

from ldm_jax.data.shapes import vocabulary


def prepare(data_dir: str, config: str = "simple") -> str:
    """Write the data set below `data_dir` unless it is there already; return its folder.

    Raises:
      ValueError: an unknown config.
    """
    vocabulary.world(config)  # one clear sentence for a wrong name, before the slow import
    from ldm_jax.data.shapes import (
        shapes_dataset_builder,
    )  # here: readers of the vocabulary need no tfds

    return shapes_dataset_builder.prepare(data_dir, config)
