"""The parts of the gallery, a function each: what a task draws and how often that is right."""

import itertools
from typing import Any, NamedTuple

import numpy as np

from ldm_jax import heatmaps, markdown, media
from ldm_jax.gallery.scene import SHOWN, Scene, judged, percent, rows
from ldm_jax.metrics import changes, shape_reader
from ldm_jax.metrics.caption_reader import parse

STRENGTHS = (0.3, 0.5, 0.7, 1.0)
PROMPTS = (
    "a red cross on the left",
    "a large blue square at the top",
    "a yellow square above a green triangle",
    "a purple square to the left of a yellow cross",
    "a small cyan triangle on the right",
    "a large green square in the middle",
    "a purple triangle at the bottom",
    "a blue triangle above a red square",
)
WORDS = ("a yellow square above a green triangle", "a purple square to the left of a yellow cross")
ENDS = ("a large purple square on the left", "a large blue square on the right")
LOOSE = "a yellow cross"
WIDE = (32, 96)
WIDE_PROMPTS = ("a large yellow cross in the middle", "a blue triangle at the top")


class Part(NamedTuple):
    """What a task has to show: rows of pictures [n h w 3] with captions, or a finished sheet, and its figures."""

    name: str
    title: str
    images: Any
    captions: list[str] | None
    columns: int
    text: str
    command: str = ""


def text(of: Scene) -> Part:
    captions = of.captions[: len(of.real)]
    drawn = of.draw(prompts=captions)
    right = shape_reader.accuracy(media.to_uint8(drawn.x), captions, of.shapes)
    shown = of.draw(prompts=PROMPTS)
    words = f"{percent(right)} of {len(captions)} captions of the validation split are drawn right."
    command = '--prompt "a red cross on the left" --prompt "a large blue square at the top"'
    return Part("text", "Text to image", rows(shown.x), list(PROMPTS), 4, words, command)


def film(of: Scene) -> Part:
    drawn = of.draw(how=dict(film=True), prompts=PROMPTS[2:4])
    steps = list(drawn.film.swapaxes(0, 1))
    change = np.abs(drawn.film[-1] - drawn.x).max()
    words = (
        "The estimate of the clean picture on the way from noise, at eight steps of the walk. Places and "
        "colours come "
        f"first. The last estimate is the picture (largest difference {change:.0e})."
    )
    command = f'--prompt "{PROMPTS[2]}" --film'
    return Part("film", "Film", rows(*steps), None, drawn.film.shape[0], words, command)


def words(of: Scene) -> Part:
    drawn = of.draw(how=dict(heatmaps=True), prompts=of.source)
    shares = {"colour": [], "shape": []}
    for image, maps, caption in zip(media.to_uint8(drawn.x), drawn.maps, of.source, strict=True):
        found, told = shape_reader.read(image, of.shapes), of.pipe.words(caption)
        if not shape_reader.matches(found, parse(caption)):
            continue
        heats = heatmaps.of_words(maps, told)
        names = [word.lower() for word, _ in told]
        for i, pair in enumerate(itertools.pairwise(names)):
            for box in [f.box for f in found if (f.colour, f.shape) == pair]:
                shares["colour"].append(changes.inside(heats[i], box))
                shares["shape"].append(changes.inside(heats[i + 1], box))
    colour, shape = (np.array(shares[k]).mean(0) for k in ("colour", "shape"))
    drawn = of.draw(how=dict(heatmaps=True), prompts=WORDS)
    sheets = [
        heatmaps.sheet(*pair, of.pipe.words(caption))
        for *pair, caption in zip(media.to_uint8(drawn.x), drawn.maps, WORDS, strict=True)
    ]
    width = max(sheet.shape[1] for sheet in sheets)
    sheets = [
        np.pad(s, ((0, 0), (0, width - s.shape[1]), (0, 0)), constant_values=255) for s in sheets
    ]
    said = (
        f"Where each word acts. The box of an object covers {percent(colour[1])} of the picture and holds "
        f"{percent(colour[0])} of the attention of its colour's word and {percent(shape[0])} of that of its shape's "
        f"({len(shares['colour'])} objects of pictures that are right)."
    )
    command = f'--prompt "{WORDS[0]}" --heatmaps'
    return Part("words", "Heat maps", np.concatenate(sheets), None, 0, said, command)


def image_to_image(of: Scene) -> Part:
    prompts, made, lines = [s.caption for s in of.swaps], [], []
    for strength in STRENGTHS:
        x = of.draw("image_to_image", prompts=prompts, images=list(of.real), strength=strength).x
        found = changes.accepted(media.to_uint8(x), media.to_uint8(of.real), of.swaps, of.shapes)
        apart = np.abs(x.clip(-1, 1) - of.real).mean() * 127.5
        found = percent(found["right"]), percent(found["kept"])
        lines.append((str(strength), *found, f"{apart:.1f}"))
        made.append(x)
    head = ("strength", "new caption right", "other object in its place")
    table = markdown.table((*head, "mean change of a pixel, of 255"), lines)
    say = f"The given pictures, and from them the new captions at the strengths {STRENGTHS}.\n\n"
    captions = [""] * SHOWN * len(STRENGTHS) + prompts[:SHOWN]
    return Part(
        "image_to_image", "Image to image", rows(of.real, *made), captions, SHOWN,
        say + table,
        '--task image_to_image --image picture.png --strength 0.5 --prompt "a blue cross on the left"',
    )  # fmt: skip


def inpaint(of: Scene) -> Part:
    masks = []
    for image, made in zip(media.to_uint8(of.real), of.swaps, strict=True):
        found = shape_reader.read(image, of.shapes)
        mask = changes.hole(found, made.old, image.shape[:2], 2)
        masks.append(np.ones(image.shape[:2], np.float32) if mask is None else mask)
    prompts = [s.caption for s in of.swaps]
    given = dict(prompts=prompts, images=list(of.real), masks=masks)
    once = of.draw("inpaint", **given).x
    often = of.draw("inpaint", repaint=(4, 4), **given).x
    rest = max(np.abs(x - of.real)[np.stack(masks) == 0].max() for x in (once, often))
    grey = np.where(np.stack(masks)[..., None] > 0, 0, of.real)
    said = (
        f"The box of one object is painted anew. Outside of the masks the largest difference to the given "
        f"pictures is "
        f"{rest:g}.\n\n- once down (second row): {judged(of, once)}\n- with `--repaint 4,4`, each stretch "
        f"of four steps four "
        f"times (third row): {judged(of, often)}"
    )
    captions = [""] * 2 * SHOWN + prompts[:SHOWN]
    command = (
        '--task inpaint --image picture.png --mask mask.png --prompt "a blue cross on the left"'
    )
    return Part("inpaint", "Inpainting", rows(grey, once, often), captions, SHOWN, said, command)


def outpaint(of: Scene) -> Part:
    half, chosen = of.every.shape[2] // 2, []
    for i, image in enumerate(media.to_uint8(of.every)):
        found = shape_reader.read(image, of.shapes)
        boxes = sorted(f.box[1::2] for f in found)
        clear = len(boxes) == 2 and boxes[0][1] <= 0.5 <= boxes[1][0]
        if clear and shape_reader.matches(found, parse(of.captions[i])):
            chosen.append(i)
    chosen = chosen[: len(of.real)]
    pieces = [of.every[i, :, :half] for i in chosen]
    prompts = [of.captions[i] for i in chosen]
    x = of.draw("outpaint", prompts=prompts, images=pieces, margins=(0, 0, 0, half)).x
    rest = np.abs(x[:, :, :half] - of.every[chosen][:, :, :half]).max()
    right = shape_reader.accuracy(media.to_uint8(x), prompts, of.shapes)
    given = np.pad(np.stack(pieces), ((0, 0), (0, 0), (0, half), (0, 0)))
    said = (
        f"The left halves of pictures get a right half, by the caption of the whole: {percent(right)} of "
        f"{len(x)} are right. "
        f"The largest difference in the left halves is {rest:g}."
    )
    blank = [""] * min(SHOWN, len(x))
    command = '--task outpaint --image half.png --margins 0,0,0,16 --prompt "a red cross left of a blue square"'
    return Part(
        "outpaint", "Outpainting", rows(given, x), blank + prompts[:SHOWN], SHOWN, said, command
    )


def edit(of: Scene) -> Part:
    prompts = [s.caption for s in of.swaps]
    drawn = of.draw("edit", prompts=prompts, source=of.source, images=list(of.real))
    rest = np.abs(drawn.x - of.real)[drawn.mask[..., 0] == 0].max()
    said = (
        "Two captions say what to change; where, is found by comparing what the model makes of both "
        "(DiffEdit; the mask is "
        f"the second row). {judged(of, drawn.x)} The masks cover {percent(drawn.mask.mean())} of the "
        f"pictures; outside of "
        f"them the largest difference is {rest:g}."
    )
    masks = np.broadcast_to(2 * drawn.mask - 1, drawn.x.shape)
    captions = of.source[:SHOWN] + [""] * SHOWN + prompts[:SHOWN]
    command = '--task edit --image picture.png --source "a red cross on the left" --prompt "a blue cross on the left"'
    return Part(
        "edit",
        "Edits by two prompts",
        rows(of.real, masks, drawn.x),
        captions,
        SHOWN,
        said,
        command,
    )


def pairs(of: Scene) -> Part:
    prompts = [s.caption for s in of.swaps]
    drawn = of.draw("prompt_to_prompt", prompts=prompts, source=of.source)
    alone = of.draw(prompts=prompts).x
    was = media.to_uint8(drawn.source)
    found, plain = (
        changes.accepted(media.to_uint8(x), was, of.swaps, of.shapes) for x in (drawn.x, alone)
    )
    apart = [np.abs(x - drawn.source).clip(0, 2).mean() * 127.5 for x in (drawn.x, alone)]
    said = (
        "Both captions are drawn from one noise, the second with the first one's attention. The new caption "
        "is right in "
        f"{percent(found['right'])} of {len(was)}, and the other object stays in its place in "
        f"{percent(found['kept'])}; without "
        f"the exchange, from the same noise alone, in {percent(plain['right'])} and "
        f"{percent(plain['kept'])}. A pixel changes by "
        f"{apart[0]:.1f} of 255 on average, without the exchange by {apart[1]:.1f}."
    )
    captions = of.source[:SHOWN] + prompts[:SHOWN]
    command = '--task prompt_to_prompt --source "a red cross on the left" --prompt "a blue cross on the left"'
    return Part(
        "prompt_to_prompt",
        "Prompt to prompt",
        rows(drawn.source, drawn.x),
        captions,
        SHOWN,
        said,
        command,
    )


def interpolate(of: Scene) -> Part:
    x = of.draw("interpolate", prompts=ENDS, frames=SHOWN).x
    y = of.draw("interpolate", prompts=[LOOSE], frames=SHOWN).x
    largest = [
        np.abs(np.diff(way, axis=0)).mean((1, 2, 3)).max() / np.abs(way[-1] - way[0]).mean()
        for way in (x, y)
    ]
    said = (
        "From one prompt and seed to another, and between two seeds of one prompt. The largest step between "
        "neighbours is "
        f"{largest[0]:.2f} and {largest[1]:.2f} of the distance between the ends."
    )
    command = f'--task interpolate --prompt "{ENDS[0]}" --prompt "{ENDS[1]}" --frames 8'
    return Part("interpolate", "Interpolation", rows(x, y), None, SHOWN, said, command)


def panorama(of: Scene) -> Part:
    x = of.draw("panorama", prompts=WIDE_PROMPTS, n=8, size=WIDE).x
    found = [
        [(f.colour, f.shape) for f in shape_reader.read(i, of.shapes)] for i in media.to_uint8(x)
    ]
    asked = [parse(p).objects[0][:2] for p in WIDE_PROMPTS for _ in range(8)]
    every = [
        object_ == want for objects, want in zip(found, asked, strict=True) for object_ in objects
    ]
    said = (
        f"{WIDE[1]} x {WIDE[0]} pixels from a model of 32 x 32, in windows that overlap by a quarter. "
        f"{len(every) / len(x):.1f} objects "
        f"a picture; {percent(np.mean(every))} of them have the colour and shape of the prompt."
    )
    command = f'--task panorama --size {WIDE[0]},{WIDE[1]} --prompt "{WIDE_PROMPTS[0]}"'
    shown = media.to_uint8(x[[0, 1, 8, 9]])
    return Part(
        "panorama", "Panorama", shown, [p for p in WIDE_PROMPTS for _ in range(2)], 2, said, command
    )


PARTS = (text, film, words, image_to_image, inpaint, outpaint, edit, pairs, interpolate, panorama)
