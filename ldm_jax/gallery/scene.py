"""What all parts of the gallery share: the model, how it samples, and real pictures to begin with."""

from typing import Any, NamedTuple

import numpy as np

from ldm_jax import build, media
from ldm_jax.metrics import changes, shape_reader
from ldm_jax.metrics.caption_reader import parse
from ldm_jax.tasks import Drawn

SHOWN = 8  # pictures a row


class Scene(NamedTuple):
    """A trained model, how it samples, and real pictures in which one object is to be changed."""

    pipe: Any
    workdir: str
    options: dict[str, Any]
    shapes: tuple[str, ...]
    captions: list[str]  # of the validation split
    real: Any  # [n h w 3] in [-1, 1], of captions whose first object can be changed ...
    source: list[str]  # ... the captions ...
    swaps: list[Any]  # ... and with what, see `metrics.changes`
    every: Any  # all pictures of `captions`

    def draw(self, task: str = "text", how: dict[str, Any] | None = None, **given: Any) -> Any:
        """All samples of a task as one `Drawn`; `how` overrides the options of sampling."""
        how = build.sampling(self.workdir, self.pipe, **self.options | (how or {}))
        batch, seeds, made, _ = build.ask(self.pipe, how, task, **given)
        parts = list(self.pipe.drawer(how)(batch, seeds, task=made))
        found = {}
        for field in Drawn._fields:
            if getattr(parts[0], field) is not None:
                axis = 1 if field == "film" else 0
                found[field] = np.concatenate([getattr(part, field) for part in parts], axis)
        return Drawn(**found)


def scene(workdir: str, n: int, options: dict[str, Any]) -> Scene:
    """The model and `n` real pictures of two objects that the reader reads right."""
    real, captions = build.examples(workdir, "validation", 8 * n)
    shapes, known = shape_reader.named(captions), changes.pairs(captions)
    chosen, swaps = [], []
    for i, caption in enumerate(captions):
        made = len(parse(caption).objects) == 2 and changes.swap(caption, known, len(chosen))
        if made and shape_reader.agrees(media.to_uint8(real[i]), caption, shapes):
            chosen.append(i)
            swaps.append(made)
    chosen, swaps = chosen[:n], swaps[:n]
    source = [captions[i] for i in chosen]
    pipe = build.pipeline(workdir)
    return Scene(pipe, workdir, options, shapes, captions, real[chosen], source, swaps, real)


def rows(*images: Any) -> Any:
    """Pictures in [-1, 1] below each other, as many as are shown, for a sheet."""
    return np.concatenate([media.to_uint8(x[:SHOWN]) for x in images])


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def judged(of: Scene, images: Any) -> str:
    pixels, real = media.to_uint8(images), media.to_uint8(of.real)
    found = changes.accepted(pixels, real, of.swaps, of.shapes)
    return (
        f"Of {len(images)} pictures {percent(found['right'])} show what the new caption says, and in "
        f"{percent(found['kept'])} the other object is still there, in its place."
    )
