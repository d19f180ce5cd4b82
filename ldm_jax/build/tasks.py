"""From what a user asks for, in words, files and numbers, to a `Task` with its conditions and seeds.

Everything that can be wrong is answered here, before any compile.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from ldm_jax.build.sections import did_you_mean
from ldm_jax.data import transforms
from ldm_jax.diffusion import editing, inpainting
from ldm_jax.nn.prompt_to_prompt import alignment
from ldm_jax.pipeline import Pipeline
from ldm_jax.tasks import NAMES, Sampling, Task

Images = Float[np.ndarray, "n *space c"]

# What each task takes beside prompts or labels; a name with a star must be given.
TAKES = {
    "text": (),
    "image_to_image": ("images*", "strength"),
    "inpaint": ("images*", "masks*", "strength", "repaint"),
    "outpaint": ("images*", "margins*", "strength", "repaint"),
    "edit": ("images*", "source*", "masks", "strength", "limit"),
    "prompt_to_prompt": ("source*", "cross", "own"),
    "interpolate": ("frames",),
    "panorama": ("size*",),
}
FLAGS = dict(images="image", masks="mask")  # the flags of `sample.py` that have another name
STRENGTH = dict(image_to_image=0.6, edit=0.8)
LIMIT = 1.5  # of the mask that an edit finds
CROSS, OWN = 0.8, 0.4  # shares of the steps
FRAMES = 8
MASK_AT = 128  # of 255: from here on a mask means that something new is made


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
    source: Sequence[str] | None = None,
    strength: float | None = None,
    margins: Sequence[int] | None = None,
    size: Sequence[int] | None = None,
    frames: int | None = None,
    cross: float | None = None,
    own: float | None = None,
    repaint: Sequence[int] | None = None,
    limit: float | None = None,
) -> Asked:
    """A task by its name, `n` samples a prompt or label.

    `images` are files or arrays in [-1, 1] [*space c], `masks` files or arrays of 0 and 1 [*space]: one for each prompt
    or one for all, as are `source` prompts; one prompt is for all images. `strength` in (0, 1] is the share of steps
    that are taken: the smaller, the closer to the given. `margins` are pixels before and after, axis by axis. `size` is
    that of the data; another than the model's is drawn in windows of the model's. `interpolate` makes `frames` pictures
    on the way from the first prompt and seed to the second; one prompt is for both. `cross` and `own` are the shares of
    the steps for which edited prompts are read where the source's words are, and positions attend to each other as the
    source's do. `repaint` is (jump, times), see `inpainting.repaint`, and `limit` that of `diffedit.binarised`: the
    lower, the more is changed.

    Raises:
      ValueError: an unknown task ("did you mean"), something missing or not for this task, or inputs that do not fit.
    """
    given = dict(
        images=images, masks=masks, source=source, strength=strength, margins=margins, size=size
    ) | dict(frames=frames, cross=cross, own=own, repaint=repaint, limit=limit)
    given = {k: v for k, v in given.items() if v is not None and np.size(v)}
    _check_task(task, given, sampling)
    _check_model(pipe, task)
    steps, taken = sampling.points.t.shape[0] - 1, {}
    if "images*" in TAKES[task]:
        share = STRENGTH.get(task, 1.0) if strength is None else strength
        taken = {"taken": editing.taken(steps, share).astype(np.int32)}
    if task == "edit":
        taken["limit"] = np.float32(LIMIT if limit is None else limit)
    if "repaint" in given:
        if len(repaint) != 2:
            raise ValueError(f"repaint={list(repaint)} must be two numbers: jump and times")
        inpainting.levels_fit(steps, *repaint)
    if prompts and labels:
        raise ValueError("give --prompt or --label, not both")
    asked = list(prompts or labels)
    if task == "interpolate":
        return _interpolate(pipe, asked, bool(labels), seed, FRAMES if frames is None else frames)
    rows, many = {}, max(len(asked), len(images or []), 1)
    asked = _spread(asked, many, "prompts") if asked else []
    captions = [caption for caption in asked for _ in range(n)]
    count = many * n

    def each(values, what):
        return [value for value in _spread(list(values), many, what) for _ in range(n)]

    space = None
    if "images" in given:
        pictures = _pictures(pipe, images, exact=task == "outpaint")
        if task == "outpaint":
            pictures, hole = _with_margins(pipe, pictures, margins)
            space, rows["mask"] = _space(pipe, pictures.shape[1:-1]), np.stack(each(hole, "masks"))
        rows["x"] = np.stack(each(pictures, "images"))
    if "masks" in given:
        rows["mask"] = np.stack(each(_masks(pipe, masks), "masks"))
    if "size" in given:
        space = _space(pipe, tuple(size))
    if "source" in given:
        sources = each(source, "source prompts")
        rows["source"] = pipe.prompts(sources)
    batch = conditions(pipe, captions, bool(labels), count)
    if task == "prompt_to_prompt":
        shares = dict(cross=CROSS if cross is None else cross, own=OWN if own is None else own)
        rows |= _exchange(pipe, rows["source"], batch)
        taken = {name: _share(name, share, steps) for name, share in shares.items()}
    if sampling.heatmaps and space is not None:
        raise ValueError("heat maps are of pictures of the model's size; leave them or size out")
    seeds = [seed + i for i in range(count)]
    made = Task(task, rows, taken, space, None if repaint is None else tuple(repaint))
    return Asked(batch, seeds, made, captions)


def conditions(
    pipe: Pipeline, captions: Sequence[str], labels: bool, count: int
) -> dict[str, np.ndarray]:
    """The batch of prompts or labels, or of none.

    Raises:
      ValueError: the model takes others.
    """
    if not captions:
        return pipe.unconditional(count)
    return pipe.labels(captions) if labels else pipe.prompts(captions)


def read_picture(path: str | Path, size: tuple[int, int] | None) -> Float[np.ndarray, "h w 3"]:
    """A picture in [-1, 1], cut and resized like the data of a run; as large as it is where `size` is None.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it cannot be decoded.
    """
    picture = _decoded(path)
    if size is None:
        return transforms.to_unit(np.asarray(picture))
    rng = np.random.default_rng(0)
    view = transforms.window(picture.size, size, crop="center", flip=False, rng=rng)
    return transforms.to_unit(transforms.show(picture, view, size))


def _decoded(path: str | Path) -> Any:
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no picture {str(path)!r}")
    try:
        return transforms.decode(Path(path).read_bytes())
    except transforms.BadImage as error:
        raise ValueError(f"the picture {str(path)!r}: {error}") from error


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
    if task == "prompt_to_prompt" and (sampling.how.two_passes or sampling.how.name != "cfg"):
        raise ValueError(
            "prompt_to_prompt needs the guidance cfg in one batch; leave name and two_passes out"
        )


def _check_model(pipe: Pipeline, task: str) -> None:
    if task in ("edit", "prompt_to_prompt") and not pipe.texts:
        raise ValueError(f"the task {task} follows prompts, and this model reads none")
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


def _pictures(pipe: Pipeline, images: Sequence[Any], exact: bool) -> Images:
    """Arrays as they are, files in the model's size; or, `exact`, in their own."""
    size = None if exact else pipe.size
    found = [
        image if isinstance(image, np.ndarray) else read_picture(image, size) for image in images
    ]
    for picture in found:
        shape = found[0].shape if exact else (*pipe.size, picture.shape[-1])
        if picture.shape != shape:
            raise ValueError(
                f"a picture of shape {picture.shape} was given where {shape} is needed"
            )
    return np.stack(found).astype(np.float32)


def _masks(pipe: Pipeline, masks: Sequence[Any]) -> Float[np.ndarray, "n *space 1"]:
    found = []
    for mask in masks:
        if not isinstance(mask, np.ndarray):
            mask = np.asarray(_decoded(mask).convert("L")) >= MASK_AT
        if mask.shape != pipe.size:
            raise ValueError(
                f"a mask of {_by(mask.shape)} pixels does not fit pictures of {_by(pipe.size)}; make it of their size"
            )
        if not mask.any():
            raise ValueError(
                "a mask is empty; it is white (or 1) where something new is to be made"
            )
        found.append((mask > 0).astype(np.float32)[..., None])
    return np.stack(found)


def _with_margins(
    pipe: Pipeline, pictures: Images, margins: Sequence[int]
) -> tuple[Float[np.ndarray, "n *large c"], Float[np.ndarray, "n *large 1"]]:
    axes = len(pipe.size)
    if len(margins) != 2 * axes or min(margins) < 0 or not any(margins):
        raise ValueError(
            f"margins={list(margins)} must be {2 * axes} numbers, at least 0 and not all of them, such as "
            "8,8,0,16 for top, bottom, left and right"
        )
    pairs = [tuple(margins[i : i + 2]) for i in range(0, 2 * axes, 2)]
    return editing.padded(pictures, pairs)


def _space(pipe: Pipeline, size: tuple[int, ...]) -> tuple[int, ...] | None:
    """The latents' positions for data of a size; None for the model's own.

    Raises:
      ValueError: a size that is smaller than the model's, or that the codec's factor does not divide.
    """
    if len(size) != len(pipe.size):
        raise ValueError(
            f"size={list(size)} must be {len(pipe.size)} numbers, such as {_by(pipe.size)}"
        )
    factors = [n // z for n, z in zip(pipe.size, pipe.shape[:-1], strict=True)]
    near = [
        max(round(n / f) * f, least) for n, f, least in zip(size, factors, pipe.size, strict=True)
    ]
    if tuple(near) != tuple(size):
        raise ValueError(
            f"{_by(size)} pixels cannot be drawn: each side is a multiple of {max(factors)} and at least that of "
            f"{_by(pipe.size)}; the nearest that works is {_by(near)}"
        )
    space = tuple(n // f for n, f in zip(size, factors, strict=True))
    return None if space == pipe.shape[:-1] else space


def _by(size: Sequence[int]) -> str:
    return "x".join(str(n) for n in size)


def _share(name: str, share: float, steps: int) -> np.integer:
    if not 0 <= share <= 1:
        raise ValueError(f"{name}={share} must be in [0, 1]; it is a share of the steps")
    return np.int32(round(share * steps))


def _exchange(
    pipe: Pipeline, sources: dict[str, np.ndarray], edited: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """How the tokens of the two prompts belong together, by the first tokenizer."""
    name = next(iter(pipe.texts))
    pairs = zip(np.asarray(sources[name]).tolist(), np.asarray(edited[name]).tolist(), strict=True)
    align, share = (np.stack(a) for a in zip(*(alignment(*pair) for pair in pairs), strict=True))
    return dict(align=align, share=share, weigh=np.ones(share.shape, np.float32))


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
