"""Samples from a trained diffusion model; reads `config.json` and a checkpoint of the work directory, never code.

    python sample.py --workdir runs/demo/model --prompt "a red cross on the left" --n 4 --film
    python sample.py --workdir runs/faces --n 16 --solver dpmpp_2m --steps 20 --seed 7

Writes one PNG a sample (its provenance in the text chunks), `grid.png` with captions, with --film `film.png`: the
estimate of the clean picture on the way from noise, one row a sample, and with --heatmaps `00000_words.png` ...: where
each word of the prompt acts.
"""

import functools
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from tqdm import tqdm

from ldm_jax import cli

FLAGS = flags.FlagValues()
text = functools.partial(flags.DEFINE_string, flag_values=FLAGS)
texts = functools.partial(flags.DEFINE_multi_string, flag_values=FLAGS)
whole = functools.partial(flags.DEFINE_integer, flag_values=FLAGS)

WORKDIR = text("workdir", None, "a run of train.py")
PROMPT = texts("prompt", [], "a prompt, or a file with one prompt a line; may be repeated")
LABEL = texts("label", [], "a class, by name or number; may be repeated")
N = whole("n", 1, "samples a prompt or label", lower_bound=1)
SOLVER = text("solver", None, "a solver of ldm_jax/diffusion/solvers; None: the config's")
STEPS = whole("steps", None, "steps of the solver; None: the config's", lower_bound=1)
GUIDANCE = flags.DEFINE_float(
    "guidance", None, "classifier-free guidance scale; None: the config's", flag_values=FLAGS
)
NEGATIVE = text("negative", None, "a prompt that guidance leads away from")
SEED = whole("seed", 0, "the first sample's seed; the others count on", lower_bound=0)
STEP = whole("checkpoint", None, "the checkpoint's step; None: the latest")
BATCH = whole("batch", 64, "samples drawn at once", lower_bound=1)
FILM = flags.DEFINE_bool("film", False, "also draw the way to the picture", flag_values=FLAGS)
HEATMAPS = flags.DEFINE_bool("heatmaps", False, "also show where each word acts", flag_values=FLAGS)
OUT = text("out", None, "a folder for the pictures; None: WORKDIR/samples")


def prompts(given: Sequence[str]) -> list[str]:
    """Prompts as they are, and those in files, one a line.

    Raises:
      FileNotFoundError: a name that ends in .txt and is no file.
      ValueError: no prompt in a file.
    """
    found = []
    for prompt in given:
        short = len(prompt) < 255  # what is longer is no file name
        if not (short and Path(prompt).is_file()):
            if short and prompt.endswith(".txt"):
                raise FileNotFoundError(f"there is no file of prompts {prompt!r}")
            found.append(prompt)
            continue
        lines = [line.strip() for line in Path(prompt).read_text().splitlines() if line.strip()]
        if not lines:
            raise ValueError(f"the file {prompt!r} holds no prompt; write one a line")
        found += lines
    return found


def main(argv: list[str]) -> None:
    cli.compile_cache()
    with cli.plain_errors():
        cli.nothing_more(argv, "a prompt is given by --prompt TEXT")
        cli.required(WORKDIR)
        import numpy as np

        from ldm_jax import build, heatmaps, media

        asked = prompts(PROMPT.value)
        if asked and LABEL.value:
            raise ValueError("give --prompt or --label, not both")
        pipeline = build.pipeline(WORKDIR.value, STEP.value)
        captions = [c for c in asked or LABEL.value for _ in range(N.value)]
        if asked:
            batch = pipeline.prompts(captions)
        elif captions:
            batch = pipeline.labels(captions)
        else:
            batch = pipeline.unconditional(N.value)
        negative = NEGATIVE.value
        against = None if negative is None else pipeline.prompts([negative] * len(captions))
        flagged = dict(solver=SOLVER.value, steps=STEPS.value, guidance=GUIDANCE.value)
        override = {k: v for k, v in flagged.items() if v is not None}
        shown = dict(film=FILM.value, heatmaps=HEATMAPS.value)
        sampling = build.sampling(WORKDIR.value, pipeline, **shown, **override)
        draw = pipeline.drawer(sampling, BATCH.value)
        out = Path(OUT.value or Path(WORKDIR.value) / "samples")
        out.mkdir(parents=True, exist_ok=True)

    seeds = [SEED.value + i for i in range(len(captions) or N.value)]
    drawn = []
    with tqdm(total=len(seeds), unit="sample") as bar:
        for part in draw(batch, seeds, against):
            drawn.append(part)
            bar.update(len(part.x))
    images = media.to_uint8(np.concatenate([part.x for part in drawn]))
    about = pipeline.provenance(sampling) | {"workdir": WORKDIR.value}
    about |= {} if negative is None else {"negative": negative}
    for i, (image, seed) in enumerate(zip(images, seeds, strict=True)):
        chunks = about | {"seed": str(seed)} | ({"prompt": captions[i]} if captions else {})
        media.save_png(out / f"{i:05d}.png", image, chunks)
    columns = N.value if captions and N.value > 1 else int(np.ceil(np.sqrt(len(images))))
    sheet = media.grid(images, columns=columns, captions=captions or None)
    media.save_png(out / "grid.png", sheet, about)
    if FILM.value:
        film = media.to_uint8(np.concatenate([part.film for part in drawn], axis=1))
        strips = film.swapaxes(0, 1).reshape(-1, *film.shape[2:])
        media.save_png(out / "film.png", media.grid(strips, columns=len(film)), about)
    if HEATMAPS.value:
        maps = np.concatenate([part.maps for part in drawn])
        for i, caption in enumerate(captions):
            sheet = heatmaps.sheet(images[i], maps[i], pipeline.words(caption))
            media.save_png(out / f"{i:05d}_words.png", sheet, about)
    print(out / "grid.png")


if __name__ == "__main__":
    cli.run(main, FLAGS)
    sys.exit(0)
