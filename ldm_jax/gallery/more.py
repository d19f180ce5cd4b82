"""More parts of the gallery: inversions, weights of words, and pictures larger than trained or without an edge."""

from typing import Any

import numpy as np

from ldm_jax import media
from ldm_jax.gallery.parts import PROMPTS, SHOWN, Part
from ldm_jax.gallery.scene import Scene, judged, percent, rows
from ldm_jax.metrics import shape_reader

LARGE = (48, 48)
WEIGHED = "a small cyan triangle on the right"
FACTORS = (0.0, 0.5, 1.0, 2.0, 4.0)


def inversion(of: Scene) -> Part:
    def drawn(prompts, guidance=1.0, **given):
        fixed = dict(source=of.source, images=list(of.real), **given)
        how = dict(solver="ddim", guidance=guidance)
        return of.draw("invert", how, prompts=prompts, **fixed).x

    coded = of.pipe.reconstruct(of.real)
    again, wanted = drawn(of.source), [s.caption for s in of.swaps]
    edited = drawn(wanted, guidance=of.options["guidance"], strength=0.7)
    apart, start = (_apart(x, coded) for x in (again, of.draw(prompts=of.source).x))
    said = (
        "DDIM inversion: the noise that a picture is made from under its caption. From there the same caption gives "
        f"the picture again (second row; a pixel differs by {apart:.1f} of 255 from what the autoencoder leaves of it, "
        f"by {start:.1f} from other noise), and another caption changes it (third row, strength 0.7, with guidance). "
        f"{judged(of, edited)}"
    )
    captions = [""] * 2 * SHOWN + wanted[:SHOWN]
    command = (
        '--task invert --image picture.png --source "a red cross on the left" --solver ddim --strength 0.7 '
        '--prompt "a blue cross on the left"'
    )
    images = rows(of.real, again, edited)
    return Part("invert", "Inversion", images, captions, SHOWN, said, command)


def friendly(of: Scene) -> Part:
    wanted, how = [s.caption for s in of.swaps], dict(solver="ddpm", steps=40)
    fixed, lines, shown = dict(source=of.source, images=list(of.real)), [], []
    coded = of.pipe.reconstruct(of.real)
    same = of.draw("edit_friendly", how | dict(guidance=1.0), prompts=of.source, **fixed).x
    for strength in (0.5, 0.64, 0.8):
        x = of.draw("edit_friendly", how, prompts=wanted, strength=strength, **fixed).x
        lines.append(f"- strength {strength}: {judged(of, x)}")
        shown.append(x)
    said = (
        "Edit-friendly inversion: the noises of all steps of a stochastic solver that lead to the picture. With the "
        f"same caption it comes back (a pixel differs by {_apart(same, coded):.1f} of 255 from what the autoencoder "
        "leaves of it); with another one, in 40 steps, below the given pictures:\n\n"
        + "\n".join(lines)
    )
    captions = [""] * len(shown) * SHOWN + wanted[:SHOWN]
    command = (
        '--task edit_friendly --image picture.png --source "a red cross on the left" --solver ddpm '
        '--prompt "a blue cross on the left"'
    )
    images = rows(of.real, *shown)
    return Part("friendly", "Edit-friendly inversion", images, captions, SHOWN, said, command)


def weights(of: Scene) -> Part:
    given, found, shown = dict(prompts=[WEIGHED], source=[WEIGHED], n=SHOWN * 4), [], []
    for factor in FACTORS:
        x = of.draw("prompt_to_prompt", weights={"cyan": factor}, **given).x
        found.append(shape_reader.accuracy(media.to_uint8(x), [WEIGHED] * len(x), of.shapes))
        shown.append(x)
    shares = ", ".join(f"{f:g}: {percent(r)}" for f, r in zip(FACTORS, found, strict=True))
    said = (
        "A word of the prompt acts more or less: its attention is multiplied, here that of `cyan` in "
        f'"{WEIGHED}", one row a factor. The share of {len(shown[0])} pictures that are right: {shares}.'
    )
    command = f'--task prompt_to_prompt --source "{WEIGHED}" --prompt "{WEIGHED}" --weight cyan=2'
    images = rows(*shown)
    return Part("weights", "Weights of words", images, None, SHOWN, said, command)


def second_pass(of: Scene) -> Part:
    first = of.draw(prompts=PROMPTS).x
    given = dict(prompts=PROMPTS, images=list(first), size=LARGE)
    large = of.draw("high_resolution", strength=0.4, **given).x
    at_once = of.draw("panorama", prompts=PROMPTS, size=LARGE).x
    right = [
        percent(shape_reader.accuracy(media.to_uint8(x), PROMPTS, of.shapes))
        for x in (first, large, at_once)
    ]
    said = (
        f"A picture of 32 x 32 is enlarged to {LARGE[1]} x {LARGE[0]}, noised (strength 0.4) and drawn again in "
        f"windows: {right[1]} of {len(PROMPTS)} show what the prompt says (first row; {right[0]} of the small ones), "
        f"and {right[2]} where all of it is drawn in windows at once (second row), which know no other place than "
        "their own."
    )
    captions = [""] * SHOWN + list(PROMPTS)
    size = ",".join(map(str, LARGE))
    command = f'--task high_resolution --image picture.png --size {size} --strength 0.4 --prompt "{PROMPTS[0]}"'
    images = rows(large, at_once)
    return Part("large", "A second pass at a larger size", images, captions, SHOWN, said, command)


def seamless(of: Scene) -> Part:
    prompts = ["a large blue square on the left"] * 16
    around, plain = (of.draw(task, prompts=prompts).x for task in ("seamless", "text"))

    def seam(x):
        return np.abs(x[:, :, 0] - x[:, :, -1]).mean() / np.abs(np.diff(x, axis=2)).mean()

    said = (
        "Pictures on a torus: opposite edges continue each other, so that they tile (each is shown twice beside and "
        "below itself). The step across the edge from left to right, over the mean step between neighbouring columns, "
        f"is {seam(around):.2f}; without the task, {seam(plain):.2f} (second row). This model has channels with its "
        "coordinates, which do know where an edge is."
    )
    tiled = [np.tile(x[: SHOWN // 2], (1, 2, 2, 1)) for x in (around, plain)]
    command = f'--task seamless --prompt "{prompts[0]}"'
    return Part("seamless", "Seamless", rows(*tiled), None, SHOWN // 2, said, command)


def _apart(x: Any, y: Any) -> float:
    """The mean change of a pixel, of 255."""
    return float(np.abs(x.clip(-1, 1) - y.clip(-1, 1)).mean() * 127.5)


MORE = (inversion, friendly, weights, second_pass, seamless)
