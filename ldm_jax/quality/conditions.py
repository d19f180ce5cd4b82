"""How closely a model trained on `shapes` follows what it is given: classes, holes, maps, boxes, small pictures ...

Samples are drawn under the conditions of validation pictures and read by the rules of `metrics.shape_reader`; so are
the real pictures, since they bound what a model can reach. `BARS` is what a reduced twin of a model of the paper has to
reach.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from ldm_jax import media
from ldm_jax.metrics import shape_reader
from ldm_jax.metrics.caption_reader import Claim, parse
from ldm_jax.pipeline import Pipeline
from ldm_jax.quality.boxes import SAME_PLACE, covered, iou, outlines, same
from ldm_jax.tasks import TEXT, Sampling, Task

SHOWN = 12  # pictures on the sheet
# The share of an object's box that is hidden: it has to be completed, and there is something to go by.
HIDDEN = (0.1, 0.5)
BARS = {
    "label": {"accuracy": 0.8},
    "hole": {"completed": 0.8},
    "segmentation": {"miou": 0.7},
    "layout": {"right": 0.8, "iou": 0.7},
    "small": {"psnr_gain": 1.0},
    "neighbours": {"right": 0.8},
}

Pictures = Float[np.ndarray, "n h w 3"]
Bytes = UInt8[np.ndarray, "n h w 3"]


class Judged(NamedTuple):
    figures: dict[str, float]
    shown: Bytes  # the conditions as pictures
    said: Sequence[str] = ()  # below them


def check(pipeline: Pipeline, captions: bool) -> str:
    """The field by which a model is judged; `captions`: whether the data has them.

    Raises:
      ValueError: it reads none of them, or it cannot be known which shapes there are.
    """
    field = next((field for field in BARS if field in pipeline.model.fields), None)
    if field is None:
        raise ValueError(
            f"the metric condition is of models that read one of {list(BARS)}, and this one reads "
            f"{list(pipeline.model.fields) or 'nothing'}; leave it out"
        )
    if field == "label":
        claims_of(pipeline.classes)
    elif not captions:
        raise ValueError(
            "the metric condition reads pictures of shapes, and the run's data has no captions to tell which; "
            "leave it out"
        )
    return field


def figures(
    pipeline: Pipeline,
    sampling: Sampling,
    real: Pictures,
    batch: Mapping[str, Any],
    captions: Sequence[str] | None,
    seed: int,
    folder: Path,
    near: Sequence[Bytes] | None = None,
) -> dict[str, Any]:
    """What the judge of the model's condition finds, whether its bars are met, and a sheet in `folder`.

    `real` are the pictures and `batch` the conditions; `captions`, or the names of classes, tell which shapes there are
    in these data. `near` are each one's neighbours, of a model that reads their embeddings.
    """
    field = check(pipeline, captions is not None)
    if field == "label":
        batch = dict(batch) | {"named": [pipeline.classes[i] for i in batch["label"]]}
    shapes = shape_reader.named(batch["named"] if captions is None else captions)
    given = {k: v for k, v in batch.items() if k != "named"}
    if field == "neighbours":
        batch = dict(batch) | {"near": near}
    task = TEXT
    if field == "hole":
        steps = np.int32(sampling.points.t.shape[0] - 1)
        task = Task("inpaint", dict(x=real, mask=batch["hole"]), {"taken": steps})
    seeds = [seed + i for i in range(len(real))]
    drawn = np.concatenate([part.x for part in pipeline.drawer(sampling)(given, seeds, task=task)])
    found = JUDGES[field](real, drawn, batch, shapes)
    sheet = np.stack([found.shown, media.to_uint8(drawn), media.to_uint8(real)], 1)[:SHOWN]
    said = [text for name in found.said[:SHOWN] for text in (name, "", "")]
    sheet = media.grid(sheet.reshape(-1, *real.shape[1:]), columns=6, captions=said or None)
    media.save_png(folder / "evaluation_condition.png", sheet, {"shows": "condition, sample, real"})
    met = all(found.figures[name] >= least for name, least in BARS[field].items())
    return found.figures | {"passed": bool(met), "conditions": len(real)}


def classed(
    real: Pictures, drawn: Pictures, batch: Mapping[str, Any], shapes: Sequence[str]
) -> Judged:
    """Classes: the share of pictures in which an object of the class' colour and shape is found.

    Whatever else is there: the class of a picture with two objects is the one that its caption names first. What a
    model reaches that knows nothing of the classes is `accuracy_other`: its samples, judged by each other's classes.
    """
    claims = claims_of(batch["named"])

    def share(pictures, claims):
        pairs = zip(media.to_uint8(pictures), claims, strict=True)
        return float(np.mean([shape_reader.contains(of, claim, shapes) for of, claim in pairs]))

    found = {
        "accuracy": share(drawn, claims),
        "accuracy_other": share(drawn, claims[1:] + claims[:1]),
        "accuracy_real": share(real, claims),
    }
    colours = np.array([shape_reader.COLOURS[claim.colour] for claim in claims], np.uint8)
    plain = np.broadcast_to(colours[:, None, None], real.shape)
    return Judged(found, plain, batch["named"])


def claims_of(classes: Sequence[str] | None) -> list[Claim]:
    """What classes say, "red cross".

    Raises:
      ValueError: classes without names, or that are no colour and shape.
    """
    if classes is None:
        raise ValueError("the metric condition needs classes that have names; leave it out")
    claims = []
    for name in classes:
        said = parse(name).objects
        if len(said) != 1:
            raise ValueError(
                f"the class {name!r} names {len(said)} objects; classes of `shapes` are one"
            )
        claims.append(said[0])
    return claims


def painted(
    real: Pictures, drawn: Pictures, batch: Mapping[str, Any], shapes: Sequence[str]
) -> Judged:
    """Holes: what changed around them (nothing), PSNR within, and how many half-hidden objects are completed rightly.

    An object is completed where one of its colour and shape stands at its place. Beside these the same figures of the
    picture whose holes are filled with the mean of what is left.
    """
    hole = batch["hole"]
    left = (real * (1 - hole)).sum((1, 2)) / np.maximum((1 - hole).sum((1, 2)), 1)
    filled = np.where(hole > 0, left[:, None, None], real)
    whole = [shape_reader.read(picture, shapes) for picture in media.to_uint8(real)]
    found = {"changed_outside": float(np.abs((drawn - real) * (1 - hole)).max())}
    for name, pictures in (("", drawn), ("_mean", filled)):
        error = (np.square(pictures.clip(-1, 1) - real) * hole).sum() / (3 * hole.sum())
        found["psnr_inside" + name] = float(10 * np.log10(4 / max(error, 1e-10)))
        completed = []
        for objects, picture, mask in zip(whole, media.to_uint8(pictures), hole, strict=True):
            seen = shape_reader.read(picture, shapes)
            for of in objects:
                if HIDDEN[0] <= covered(mask[..., 0], of.box) <= HIDDEN[1]:
                    completed.append(any(same(of, other) for other in seen))
        found["completed" + name] = float(np.mean(completed)) if completed else 0.0
    found["objects"] = float(len(completed))
    return Judged(found, media.to_uint8(real * (1 - hole) - hole))


def mapped(
    real: Pictures, drawn: Pictures, batch: Mapping[str, Any], shapes: Sequence[str]
) -> Judged:
    """Maps: mean intersection over union of the classes, in what is read off the samples and off the real pictures."""
    wanted = batch["segmentation"][..., 0]
    found = {}
    for name, pictures in (("miou", drawn), ("miou_real", real)):
        read = np.stack([labels(picture, shapes) for picture in media.to_uint8(pictures)])
        found[name] = mean_iou(wanted, read, len(shapes) + 1)
    greys = np.linspace(40, 230, len(shapes) + 1).astype(np.uint8)
    return Judged(found, np.repeat(greys[wanted][..., None], 3, -1))


def placed(
    real: Pictures, drawn: Pictures, batch: Mapping[str, Any], shapes: Sequence[str]
) -> Judged:
    """Boxes: the share of objects that stand in their boxes with their colour, and with their shape too.

    And the mean intersection over union of the objects' boxes with those of the same colour (0 where there is none),
    and the share of pictures in which all is right and nothing more is there.
    """
    colour, right, ious, whole, shown = [], [], [], [], []
    for picture, original in zip(media.to_uint8(drawn), media.to_uint8(real), strict=True):
        seen, objects = (shape_reader.read(p, shapes) for p in (picture, original))
        here = []
        for of in objects:
            alike = [other for other in seen if other.colour == of.colour]
            ious.append(max((iou(of.box, other.box) for other in alike), default=0.0))
            colour.append(any(iou(of.box, other.box) >= SAME_PLACE for other in alike))
            here.append(any(same(of, other) for other in seen))
        right += here
        whole.append(all(here) and len(seen) == len(objects))
        shown.append(outlines(objects, original.shape[:2]))
    found = dict(colour=colour, right=right, iou=ious, whole=whole)
    return Judged({k: float(np.mean(v)) for k, v in found.items()}, np.stack(shown))


def enlarged(
    real: Pictures, drawn: Pictures, batch: Mapping[str, Any], shapes: Sequence[str]
) -> Judged:
    """Small pictures: PSNR of the samples, of bicubic interpolation, and the difference, in dB."""
    size = real.shape[2], real.shape[1]
    bicubic = np.stack(
        [
            np.asarray(Image.fromarray(small).resize(size, Image.Resampling.BICUBIC))
            for small in media.to_uint8(batch["small"])
        ]
    )
    ours, theirs = (psnr(media.to_uint8(drawn), real), psnr(bicubic, real))
    return Judged(dict(psnr=ours, psnr_bicubic=theirs, psnr_gain=ours - theirs), bicubic)


def retrieved(
    real: Pictures, drawn: Pictures, batch: Mapping[str, Any], shapes: Sequence[str]
) -> Judged:
    """Neighbours: the share of samples with all objects, in colour and shape, that most of their neighbours have.

    And with no others; beside it that of the samples judged by each other's neighbours, which is chance, and that of
    the real pictures. `objects` is the share of those objects that are there, whatever else is. Where most neighbours
    have no object in common, a picture does not count.
    """
    wanted = [common([kinds(x, shapes) for x in of]) for of in batch["near"]]
    drawn_kinds, real_kinds = (
        [kinds(picture, shapes) for picture in media.to_uint8(pictures)]
        for pictures in (drawn, real)
    )

    def share(seen, wanted):
        agreed = [a == b for a, b in zip(seen, wanted, strict=True) if b]
        return float(np.mean(agreed)) if agreed else 0.0

    there = [kind in seen for seen, of in zip(drawn_kinds, wanted, strict=True) for kind in of]
    found = {
        "right": share(drawn_kinds, wanted),
        "right_other": share(drawn_kinds, wanted[1:] + wanted[:1]),
        "right_real": share(real_kinds, wanted),
        "objects": float(np.mean(there)) if there else 0.0,
    }
    return Judged(found, np.stack([of[0] for of in batch["near"]]))


def kinds(picture: UInt8[np.ndarray, "h w 3"], shapes: Sequence[str]) -> frozenset[Any]:
    """The colours and shapes of the objects in a picture."""
    return frozenset((of.colour, of.shape) for of in shape_reader.read(picture, shapes))


def common(of: Sequence[frozenset[Any]]) -> frozenset[Any]:
    """What more than half of them have."""
    return frozenset(
        kind for kind in frozenset().union(*of) if 2 * sum(kind in one for one in of) > len(of)
    )


def psnr(pictures: Bytes, real: Pictures) -> float:
    """The mean over pictures, in dB."""
    error = np.square(pictures / 127.5 - 1 - real).reshape(len(real), -1).mean(1)
    return float(np.mean(10 * np.log10(4 / np.maximum(error, 1e-10))))


def labels(picture: UInt8[np.ndarray, "h w 3"], shapes: Sequence[str]) -> Int[np.ndarray, "h w"]:
    """The map of a picture as it is read: 0 where nothing is, k + 1 where the k-th of `shapes` is."""
    size = picture.shape[:2]
    found = np.zeros(size, np.int64)
    for of in shape_reader.read(picture, shapes):
        if of.shape is not None:
            box = np.array(of.box)[None] * np.tile(size, 2)
            found[shape_reader.template(of.shape, box, size)[0] >= 0.5] = shapes.index(of.shape) + 1
    return found


def mean_iou(
    wanted: Int[np.ndarray, "n h w"], found: Int[np.ndarray, "n h w"], classes: int
) -> float:
    """Intersection over union of each class over all pictures, and the mean over the classes that are there."""
    values = []
    for k in range(classes):
        either = (wanted == k) | (found == k)
        if either.any():
            values.append(((wanted == k) & (found == k)).sum() / either.sum())
    return float(np.mean(values))


JUDGES = dict(label=classed, hole=painted, segmentation=mapped, layout=placed, small=enlarged)
JUDGES |= dict(neighbours=retrieved)
