"""From what a user asks for, in words, files and numbers, to a `Task` with its conditions and seeds.

Everything that can be wrong is answered here, before any compile.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ldm_jax import guided
from ldm_jax.build import exchanged, extras, pictures
from ldm_jax.build.sections import did_you_mean
from ldm_jax.combined import combined
from ldm_jax.data.examples import HOLE, SEGMENTATION, SMALL
from ldm_jax.diffusion import editing, inpainting
from ldm_jax.pipeline import Pipeline
from ldm_jax.quality.embedding import Embedding
from ldm_jax.tasks import NAMES, Sampling, Task

# What each task takes beside prompts or labels; a name with a star must be given.
TAKES = {
    "text": ("boxes", "examples"),
    "image_to_image": ("images*", "strength", "boxes", "examples"),
    "inpaint": ("images*", "masks*", "strength", "repaint", "boxes", "examples"),
    "outpaint": ("images*", "margins*", "strength", "repaint", "boxes", "examples"),
    "edit": ("images*", "source*", "masks", "strength", "limit"),
    "prompt_to_prompt": ("source*", "cross", "own", "weights"),
    "interpolate": ("frames",),
    "panorama": ("size*",),
    "upscale": ("images*",),
    "invert": ("images*", "source*", "strength"),
    "edit_friendly": ("images*", "source*", "strength"),
    "high_resolution": ("images*", "size*", "strength"),
    "seamless": ("boxes", "examples"),
    "semantic": ("maps*",),
}
# The flags of `sample.py` that have another name.
FLAGS = dict(images="image", masks="mask", maps="map", weights="weight")
STRENGTH = dict(image_to_image=0.6, edit=0.8, edit_friendly=0.64, high_resolution=0.5)
LIMIT = 1.5  # of the mask that an edit finds
CROSS, OWN = 0.8, 0.4  # shares of the steps
FRAMES = 8
# Tasks that combine no others.
ONE_PROMPT = ("edit", "invert", "edit_friendly", "prompt_to_prompt", "interpolate")


class Asked(NamedTuple):
    """What `Pipeline.drawer(...)(batch, seeds, task=task)` draws; there are no captions where nothing was said."""

    batch: dict[str, Any]
    seeds: list[int]
    task: Task
    captions: list[str]


def ask(
    pipe: Pipeline,
    sampling: Sampling,
    task: str = "text",
    *,
    prompts: Sequence[str] = (),
    labels: Sequence[str] = (),
    n: int = 1,
    seed: int = 0,
    images: Sequence[Any] | None = None,
    masks: Sequence[Any] | None = None,
    maps: Sequence[Any] | None = None,
    boxes: Sequence[Any] | None = None,
    examples: Sequence[Any] | None = None,
    embedding: Embedding | None = None,
    source: Sequence[str] | None = None,
    strength: float | None = None,
    margins: Sequence[int] | None = None,
    size: Sequence[int] | None = None,
    frames: int | None = None,
    cross: float | None = None,
    own: float | None = None,
    repaint: Sequence[int] | None = None,
    limit: float | None = None,
    weights: Mapping[str, float] | None = None,
    towards: Sequence[str] = (),
) -> Asked:
    """A task by its name, `n` samples a prompt or label; "a AND b" and "a BLEND b" combine prompts (see `combined`).

    `images` are files or arrays in [-1, 1] [*space c], `masks` files or arrays of 0 and 1 [*space], `maps` files or
    integer arrays of classes [*space], of the model's size or larger, `boxes` files or lists (see `boxes`), `examples`
    pictures whose neighbours are looked up by an `embedding`: one for each prompt or one for all, as are
    `source` prompts; one prompt is for all images. `strength` in (0, 1] is the share of steps
    that are taken: the smaller, the closer to the given. `margins` are pixels before and after, axis by axis. `size` is
    that of the data; another than the model's is drawn in windows of the model's. `interpolate` makes `frames` pictures
    on the way from the first prompt and seed to the second; one prompt is for both. `cross` and `own` are the shares of
    the steps for which edited prompts are read where the source's words are, and positions attend to each other as the
    source's do. `repaint` is (jump, times), see `inpainting.repaint`, and `limit` that of `diffedit.binarised`: the
    lower, the more is changed. `weights` of words of the edited prompts, {word: factor}, make them act more or less.
    `towards` are the texts, one a prompt or one for all, to which the gradients of `Sampling.towards` lead; by default
    the prompts or labels themselves.

    Raises:
      ValueError: an unknown task ("did you mean"), something missing or not for this task, or inputs that do not fit.
    """
    given = dict(
        images=images, masks=masks, maps=maps, source=source, strength=strength, margins=margins
    ) | dict(size=size, frames=frames, cross=cross, own=own, repaint=repaint, limit=limit)
    given |= dict(weights=weights or None, boxes=boxes, examples=examples)
    given = {k: v for k, v in given.items() if v is not None and (np.isscalar(v) or len(v))}
    _check_task(task, given, sampling)
    _check_towards(task, towards, sampling)
    _check_model(pipe, task)
    steps, taken = sampling.points.t.shape[0] - 1, {}
    if "strength" in TAKES[task]:
        share = STRENGTH.get(task, 1.0) if strength is None else strength
        taken = {"taken": editing.taken(steps, share).astype(np.int32)}
    if task == "edit":
        taken["limit"] = np.float32(LIMIT if limit is None else limit)
    if "repaint" in given:
        if len(repaint) != 2:
            raise ValueError(f"repaint={list(repaint)} must be two numbers: jump and times")
        inpainting.levels_fit(steps, *repaint)
        if HOLE in pipe.model.fields:
            raise ValueError(
                "this model was trained to inpaint and sees what is to stay; leave --repaint out"
            )
    if prompts and labels:
        raise ValueError("give --prompt or --label, not both")
    asked = list(prompts or labels)
    _check_combined(combined(asked).how, task, sampling)
    if task == "interpolate":
        return _interpolate(pipe, asked, bool(labels), seed, FRAMES if frames is None else frames)
    several = (asked, *(given.get(name, ()) for name in ("images", "maps", "boxes", "examples")))
    rows, many = {}, max(1, *map(len, several))
    asked = _spread(asked, many, "prompts") if asked else []
    parts = combined(asked)
    captions = [caption for caption in asked for _ in range(n)]
    count = many * n

    def each(values, what):
        return [value for value in _spread(list(values), many, what) for _ in range(n)]

    space, beside = None, {}
    if task == "upscale":
        found, space = pictures.small(pipe, images, sampling)
        beside = {SMALL: np.stack(each(found, "images"))}
    elif task == "high_resolution":
        space = pictures.space_of(pipe, tuple(size))
        rows["x"] = np.stack(each(pictures.enlarged(pipe, images, size), "images"))
    elif task == "semantic":
        found, space = pictures.maps(pipe, maps)
        beside = {SEGMENTATION: np.stack(each(found, "maps"))}
    elif "images" in given:
        found = pictures.pictures_of(pipe, images, exact=task == "outpaint")
        if task == "outpaint":
            found, hole = pictures.with_margins(pipe, found, margins)
            space, rows["mask"] = (
                pictures.space_of(pipe, found.shape[1:-1]),
                np.stack(each(hole, "masks")),
            )
        rows["x"] = np.stack(each(found, "images"))
    if "masks" in given:
        rows["mask"] = np.stack(each(pictures.masks(pipe, masks), "masks"))
    found = extras.given(pipe, boxes or (), examples or (), embedding)
    beside |= {name: np.stack(each(list(of), name)) for name, of in found.items()}
    if task == "panorama":
        space = pictures.space_of(pipe, tuple(size))
    if "source" in given:
        sources = each(source, "source prompts")
        rows["source"] = pipe.prompts(sources)
    each_part = [[text for text in column for _ in range(n)] for column in parts.columns]
    painted = (HOLE, "masked") if task == "inpaint" else ()  # which are made of the rows
    also = (*beside, *painted)
    batch, *others = [conditions(pipe, column, bool(labels), count, also) for column in each_part]
    batch |= beside
    if parts.how:
        rows |= {"others": tuple(others), "weights": parts.weights.repeat(n, axis=0)}
    if task == "prompt_to_prompt":
        shares = dict(cross=CROSS if cross is None else cross, own=OWN if own is None else own)
        weigh = exchanged.weighed(pipe, each_part[0], weights or {})
        rows |= exchanged.rows(pipe, rows["source"], batch, weigh)
        taken = {name: exchanged.steps_of(name, share, steps) for name, share in shares.items()}
    if sampling.towards is not None:
        texts = each(towards, "texts to lead to") if towards else captions
        if not texts:
            raise ValueError("gradients lead to what a text says; give --towards TEXT")
        rows["towards"] = np.asarray(sampling.towards.wanted(texts))
    if sampling.heatmaps and space is not None:
        raise ValueError("heat maps are of pictures of the model's size; leave them or size out")
    seeds = [seed + i for i in range(count)]
    repeats = None if repaint is None else tuple(repaint)
    made = Task(task, rows, taken, space, repeats, parts.how)
    return Asked(batch, seeds, made, captions)


def conditions(
    pipe: Pipeline,
    captions: Sequence[str],
    labels: bool,
    count: int,
    beside: Sequence[str] = (),
) -> dict[str, np.ndarray]:
    """The batch of prompts or labels, or of none; the fields `beside` are added by the caller.

    Raises:
      ValueError: the model takes others.
    """
    if not captions:
        return pipe.unconditional(count, beside)
    return (pipe.labels if labels else pipe.prompts)(captions, beside)


def _check_task(task: str, given: dict[str, Any], sampling: Sampling) -> None:
    if task not in TAKES:
        raise ValueError(f"there is no task {task!r}{did_you_mean(task, NAMES)}")
    takes = [name.rstrip("*") for name in TAKES[task]]
    for name in given:
        if name not in takes:
            fits = [other for other in TAKES if name in "".join(TAKES[other])]
            raise ValueError(
                f"the task {task} takes no --{FLAGS.get(name, name)}; it belongs to {', '.join(fits)}"
            )
    for name in TAKES[task]:
        if name.endswith("*") and name[:-1] not in given:
            name = name[:-1]
            raise ValueError(f"the task {task} needs --{FLAGS.get(name, name)}")
    if task in ("interpolate", "prompt_to_prompt") and sampling.heatmaps:
        raise ValueError(f"there are no heat maps of the task {task}, which mixes two prompts")
    if task == "invert" and sampling.stochastic:
        raise ValueError(
            "invert finds the noise that a picture is made from, and this solver adds more; use --solver ddim"
        )
    if task == "edit_friendly" and not sampling.invertible:
        raise ValueError(
            "edit_friendly finds the noises of a solver that adds them at the end of its steps; use --solver ddpm"
        )
    if task == "prompt_to_prompt" and (sampling.how.two_passes or sampling.how.name != "cfg"):
        raise ValueError(
            "prompt_to_prompt needs the guidance cfg in one batch; leave name and two_passes out"
        )


def _check_towards(task: str, towards: Sequence[str], sampling: Sampling) -> None:
    if towards and sampling.towards is None:
        raise ValueError("--towards needs a network that judges pictures; give --judge PATH")
    if sampling.towards is not None and task in ONE_PROMPT:
        raise ValueError(f"the task {task} goes between two prompts; leave --judge out")


def _check_combined(how: str | None, task: str, sampling: Sampling) -> None:
    if sampling.how.name == "auto" and task in ONE_PROMPT:
        raise ValueError(
            f"the task {task} goes between two prompts, of which autoguidance has one; give another guidance"
        )
    if how is None:
        return
    if task in ONE_PROMPT or sampling.heatmaps:
        what = "heat maps show" if sampling.heatmaps else f"the task {task} takes"
        raise ValueError(f"{what} one prompt, and {how} combines several; give them one by one")
    if how == "AND":
        guided.check_several(sampling.how, sampling.numbers)


def _check_model(pipe: Pipeline, task: str) -> None:
    if "source*" in TAKES[task] and not pipe.texts:
        raise ValueError(f"the task {task} follows prompts, and this model reads none")
    if task == "upscale" and SMALL not in pipe.model.fields:
        raise ValueError(
            f"the task upscale is for models that were trained to read the field {SMALL!r}, and this one reads "
            f"{list(pipe.model.fields) or 'nothing'}"
        )
    if task == "semantic" and SEGMENTATION not in pipe.model.fields:
        raise ValueError(
            f"the task semantic is for models that were trained to read the field {SEGMENTATION!r}, and this one reads "
            f"{list(pipe.model.fields) or 'nothing'}"
        )
    if task == "interpolate" and not pipe.model.fields:
        raise ValueError(
            "the task interpolate goes from one prompt to another, and this model is unconditional"
        )


def _spread(values: list[Any], many: int, what: str) -> list[Any]:
    values = values * many if len(values) == 1 else values
    if len(values) != many:
        raise ValueError(
            f"{len(values)} {what} do not fit {many} samples; give one for each, or one"
        )
    return values


def _interpolate(
    pipe: Pipeline, asked: Sequence[str], labels: bool, seed: int, frames: int
) -> Asked:
    if not 1 <= len(asked) <= 2 or frames < 2:
        raise ValueError(
            f"interpolate needs one or two prompts and at least two frames, not {len(asked)} and {frames}"
        )
    first, second = (
        conditions(pipe, [text] * frames, labels, frames) for text in (asked[0], asked[-1])
    )
    shares = np.linspace(0, 1, frames, dtype=np.float32)
    seeds = np.full(frames, seed + 1, np.int32)
    rows = dict(second=second, seed=seeds, share=shares)
    captions = [f"{asked[0]} {1 - s:.0%}, {asked[-1]} {s:.0%}" for s in shares]
    return Asked(first, [seed] * frames, Task("interpolate", rows), captions)
