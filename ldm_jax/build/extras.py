"""Conditions that a user gives as boxes, or as pictures whose neighbours are looked up, as fields of a batch."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from ldm_jax import media
from ldm_jax.build import boxes as of_boxes
from ldm_jax.build import parts, pictures
from ldm_jax.build.sections import section
from ldm_jax.data import neighbours
from ldm_jax.data.examples import LAYOUT
from ldm_jax.data.layout import Layout
from ldm_jax.pipeline import Pipeline
from ldm_jax.quality import embedding as embeddings
from ldm_jax.quality.embedding import Embedding
from ldm_jax.quality.pictures import of_array


def of(config: ConfigDict, kinds: of_boxes.Kinds) -> dict[str, Any]:
    """What a pipeline of a config has for these: `boxes` and `similar`, None where its data has no such thing."""
    layout, source = parts.layout(config), section(parts.data(config)["source"], "data.source")
    return dict(
        boxes=layout and functools.partial(of_boxes.tokens, Layout(**layout), kinds),
        similar=functools.partial(similar, source["index"], source.get("neighbours", 20))
        if "index" in source
        else None,
    )


def similar(
    index: str, k: int, images: Sequence[Any], by: Embedding, side: int
) -> Float[np.ndarray, "n {k} d"]:
    """The vectors of the k neighbours of each picture, of a file or an array in [-1, 1].

    They are cut to squares first, of the embedding's size or of `side`.

    Raises:
      FileNotFoundError, ValueError: no such picture or index, or an index that another network made.
    """
    found, size = neighbours.read(index), (by.size or side,) * 2
    if found.network and found.network != by.network:
        raise ValueError(
            f"the index {index} was made with another network ({found.network[:24]}..., this is "
            f"{by.network[:24]}...); give that one, or write the index and train anew"
        )
    shown = [
        image if isinstance(image, np.ndarray) else pictures.read_picture(image, size)
        for image in images
    ]
    return neighbours.look_up(
        found, by.embed(of_array("examples", media.to_uint8(np.stack(shown)))), k
    )


def embedding(
    clip: str | Path | None, features: str | None, examples: Sequence[Any]
) -> Embedding | None:
    """What embeds the examples; None where there are none.

    Raises:
      ValueError: a network without examples, examples without one; see `quality.embedding.named`, too.
    """
    if examples:
        return embeddings.named(clip, features)
    if clip or features:
        raise ValueError("--clip and --features embed pictures; give --examples, or leave them out")
    return None


def given(
    pipe: Pipeline, boxes: Sequence[Any], examples: Sequence[Any], by: Embedding | None
) -> Mapping[str, np.ndarray]:
    """The fields of boxes and of examples, a row each.

    Raises:
      ValueError: the model does not read them; see `boxes.tokens` and `similar`, too.
    """
    fields: dict[str, np.ndarray] = {}
    for name, asked, field in (("boxes", boxes, LAYOUT), ("examples", examples, neighbours.FIELD)):
        if asked and field not in pipe.model.fields:
            raise ValueError(
                f"this model reads no {name} but {list(pipe.model.fields) or 'nothing'}; leave --{name} out"
            )
    if boxes:
        read = [of_boxes.read(one) if isinstance(one, str | Path) else one for one in boxes]
        fields[LAYOUT] = np.stack([pipe.boxes(one) for one in read])
    if examples:
        if by is None:
            raise ValueError(
                "examples need what embeds them; give --features shapes:FILE or --clip FOLDER"
            )
        fields[neighbours.FIELD] = pipe.similar(examples, by, min(pipe.size))
    return fields
