"""The conditioner of a config, and the fields of the data that it may read."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from ldm_jax.build import autoencoder, parts
from ldm_jax.build.sections import accepted, plain, section
from ldm_jax.data.examples import HOLE, LAYOUT, SEGMENTATION, SMALL
from ldm_jax.data.layout import Layout
from ldm_jax.data.neighbours import FIELD as NEIGHBOURS
from ldm_jax.types import Batch


def conditioner(config: ConfigDict, provided: dict[str, Any]) -> Any:
    """The conditioner; `provided` (by the tokenizer, by the data) fills what its sections leave out."""

    def one(value):
        given = section(value, "conditioner")
        if "parts" in given:
            given["parts"] = tuple(one(part) for part in given["parts"])
        takes = accepted("conditioners", given["name"])
        of_field = layout_words(config) if given.get("field") == LAYOUT else provided
        known = {k: v for k, v in of_field.items() if k in takes}
        if given.get("field", "label") != "label":
            known.pop("classes", None)  # the data's are those of their labels
        return parts.make_section("conditioners", known | given, "conditioner")

    return one(config.conditioner) if "conditioner" in config else None


def layout_words(config: ConfigDict) -> dict[str, Any]:
    """What a text conditioner has to know of boxes as tokens; of none at all, each token is the one for no object.

    Raises:
      ValueError: the config does not say how boxes become tokens.
    """
    of = parts.layout(config)
    if of is None:
        raise ValueError(
            f"the conditioner reads the field {LAYOUT!r} and data.layout is missing; give classes, objects and vocab"
        )
    made = Layout(**of)
    return {"vocab": made.vocab, "length": made.length, "null": (), "pad": made.none}


def example(
    config: ConfigDict,
    fields: Sequence[str],
    provided: dict[str, Any],
    latent: Sequence[int] = (),
) -> Batch:
    """A batch of one, of zeros, for shapes: the fields that a conditioner may read. `latent` is the shape of one."""
    size, shrink = autoencoder.data_shape(config)[:-1], config.data.get("shrink", 1)
    of = parts.layout(config)
    given = plain(config.get("conditioner", {}))
    tokens = [(s["count"], s["width"]) for s in given.get("parts", (given,)) if "count" in s]
    shapes = {
        "label": ((1,), jnp.int32),
        "tokens": ((1, provided.get("length", 1)), jnp.int32),
        SEGMENTATION: ((1, *size, 1), jnp.int32),
        HOLE: ((1, *size, 1), jnp.float32),
        "masked": ((1, *latent), jnp.float32),
        LAYOUT: ((1, Layout(**of).length if of else 1), jnp.int32),
        NEIGHBOURS: ((1, *(tokens or [(1, 1)])[0]), jnp.float32),
        SMALL: ((1, *(n // shrink for n in size), 3), jnp.float32),
    }
    unknown = sorted(set(fields) - set(shapes))
    if unknown:
        raise ValueError(f"the conditioner reads {unknown}; the data has only {sorted(shapes)}")
    return {field: jnp.zeros(*shapes[field]) for field in fields}
