"""The first examples of a run's validation data, by which its model is measured."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from ldm_jax import media
from ldm_jax.build import parts, pictures
from ldm_jax.data import transforms
from ldm_jax.data.beside import Beside
from ldm_jax.pipeline import Pipeline
from ldm_jax.quality.pictures import Pictures
from ldm_jax.types import Batch


class Validation(NamedTuple):
    """The first examples of a run's validation data; what is a function is read when it is called."""

    name: str
    count: int
    fingerprint: str
    picture: Callable[[int], np.ndarray]  # [h w c] in [-1, 1]
    captions: Callable[[], list[str]] | None
    conditions: Callable[[], Batch]  # of all of them, for `Pipeline.drawer`
    # Of each the pictures [k h w 3] in 8 bits whose embeddings a model reads.
    neighbours: Callable[[], list[np.ndarray]] | None = None

    def pictures(self) -> Pictures:
        """The pictures alone, in 8 bits."""

        def read(i):
            return media.to_uint8(self.picture(i))

        return Pictures(self.name, self.count, read, fingerprint=self.fingerprint)


def validation(config: ConfigDict, n: int, of: Pipeline | None = None) -> Validation:
    """The first `n` examples, whole on every process; without a pipeline there are no conditions.

    Raises:
      ValueError: fewer examples than `n`.
    """
    source = parts.source(config, **parts.data(config)["validation"])
    if n > len(source):
        raise ValueError(f"{source.name} has {len(source)} examples, not {n}; give a smaller n")
    fields = of.model.fields if of else ()
    made = (*of.texts, *of.common, "masked") if of else ()  # by the pipeline, and by the codec
    own = [f for f in fields if f not in made]
    fixed = dict(crop="center", flip=False, shuffle=False, repeat=False)
    alone = dict(process_index=0, process_count=1)
    one = parts.batches(config, source, own, batch=1, **fixed, **alone)

    def captions():
        return [one.captions(i)[0] for i in range(n)]

    def conditions():
        if not fields:
            return of.unconditional(n) if of else {}
        rows = [one[i] for i in range(n)] if own else []
        shown = ("x",) if "masked" in fields else ()
        made = {name: np.concatenate([row[name] for row in rows]) for name in (*own, *shown)}
        return made | (of.prompts(captions(), beside=(*own, "masked")) if of.texts else {})

    def neighbours():
        size = one[0]["x"].shape[1:3]
        return [
            np.stack([pictures.centred(transforms.decode(of), size) for of in source.made_of(i)])
            for i in range(n)
        ]

    told = captions if "caption" in source.fields else None
    near = neighbours if isinstance(source, Beside) and source.made_of else None
    identity = f"{source.fingerprint} {parts.data(config)['size']}"
    return Validation(source.name, n, identity, lambda i: one[i]["x"][0], told, conditions, near)
