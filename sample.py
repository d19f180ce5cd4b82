"""Samples from a trained diffusion model; reads `config.json` and a checkpoint of the work directory, never code.

    python sample.py --workdir runs/demo/model --prompt "a red cross on the left" --n 4 --film
    python sample.py --workdir runs/faces --n 16 --solver dpmpp_2m --steps 20 --seed 7
    python sample.py --workdir runs/demo/model --task edit --image a.png --source "a red cross" --prompt "a blue cross"

Writes one PNG a sample (its provenance in the text chunks), `grid.png` with captions, with --film `film.png`: the
estimate of the clean picture on the way from noise, one row a sample, and with --heatmaps `00000_words.png` ...: where
each word of the prompt acts. A task other than text reads --image, --mask ... (docs/guide.md has them all).
"""

import functools
import sys
from pathlib import Path

from absl import flags
from tqdm import tqdm

from ldm_jax import cli, heap

FLAGS = flags.FlagValues()
text = functools.partial(flags.DEFINE_string, flag_values=FLAGS)
texts = functools.partial(flags.DEFINE_multi_string, flag_values=FLAGS)
whole = functools.partial(flags.DEFINE_integer, flag_values=FLAGS)
numbers = functools.partial(flags.DEFINE_list, flag_values=FLAGS)

WORKDIR = text("workdir", None, "a run of train.py")
PROMPT = texts("prompt", [], "a prompt, or a file with one a line; may be repeated; AND, BLEND")
LABEL = texts("label", [], "a class, by name or number; may be repeated")
N = whole("n", 1, "samples a prompt or label", lower_bound=1)
SOLVER = text("solver", None, "a solver of ldm_jax/diffusion/solvers; None: the config's")
SPACING = text("spacing", None, "a grid of ldm_jax/diffusion/spacings.py; None: the config's")
STEPS = whole("steps", None, "steps of the solver; None: the config's", lower_bound=1)
GUIDANCE = flags.DEFINE_float(
    "guidance", None, "classifier-free guidance scale; None: the config's", flag_values=FLAGS
)
WEAK = text("weak", None, "guide away from a weaker model: a run, or an earlier step of this run")
NEGATIVE = text("negative", None, "a prompt that guidance leads away from")
JUDGE = text(
    "judge", None, "lead, by gradients, to what a network sees: a CLIP folder, or a classifier"
)
TOWARDS = texts("towards", [], "what the judge is to see; by default the prompts; may be repeated")
PULL = flags.DEFINE_float("pull", 1.0, "the scale of the judge's gradient", flag_values=FLAGS)
SEED = whole("seed", None, "the first sample's seed, or 0; the others count on", lower_bound=0)
STEP = whole("checkpoint", None, "the checkpoint's step; None: the latest")
EMA = text("ema", None, "which of the run's averages, by name; None: the first")
BATCH = whole("batch", 64, "samples drawn at once", lower_bound=1)
TASK = text(
    "task", "text", "text, or image_to_image, inpaint, outpaint, edit, prompt_to_prompt ..."
)
IMAGE = texts("image", [], "a picture for the task: PNG, JPEG ...; may be repeated")
MASK = texts("mask", [], "a picture that is white where something new is made; may be repeated")
BOXES = texts("boxes", [], "a JSON file of boxes with classes, for one picture; may be repeated")
EXAMPLES = texts("examples", [], "a picture whose neighbours are looked up; may be repeated")
CLIP = text("clip", None, "what embeds --examples: the folder of a CLIP model ...")
FEATURES = text("features", None, "... or shapes:FILE, as the index was made")
MAP = texts("map", [], "a map of classes for the task semantic: PNG; may be repeated")
SOURCE = texts(
    "source", [], "what the picture shows, or the prompt that is edited; may be repeated"
)
STRENGTH = flags.DEFINE_float(
    "strength", None, "the share of the steps taken from a picture, in (0, 1]", flag_values=FLAGS
)
MARGINS = numbers("margins", None, "of outpaint, in pixels: top,bottom,left,right")
SIZE = numbers("size", None, "of panorama and high_resolution, in pixels: height,width")
REPAINT = numbers("repaint", None, "jump,times: how the steps of inpaint and outpaint are repeated")
WEIGHT = texts("weight", [], "WORD=FACTOR: of prompt_to_prompt; may be repeated")
FRAMES = whole("frames", None, "of interpolate", lower_bound=2)
FILM = flags.DEFINE_bool("film", False, "also draw the way to the picture", flag_values=FLAGS)
HEATMAPS = flags.DEFINE_bool("heatmaps", False, "also show where each word acts", flag_values=FLAGS)
OUT = text("out", None, "a folder for the pictures; None: WORKDIR/samples")


def main(argv: list[str]) -> None:
    heap.keep()
    cli.compile_cache()
    with cli.plain_errors():
        cli.nothing_more(argv, "a prompt is given by --prompt TEXT")
        cli.required(WORKDIR)
        import numpy as np

        from ldm_jax import build, heatmaps, media, towards

        pipeline = build.pipeline(WORKDIR.value, STEP.value, EMA.value)
        negative = NEGATIVE.value
        flagged = dict(solver=SOLVER.value, steps=STEPS.value, guidance=GUIDANCE.value)
        flagged |= dict(spacing=SPACING.value)
        override = {k: v for k, v in flagged.items() if v is not None}
        if WEAK.value is not None:
            override["guidance"] = build.away_from(WEAK.value, GUIDANCE.value)
        shown = dict(film=FILM.value, heatmaps=HEATMAPS.value)
        sampling = build.sampling(WORKDIR.value, pipeline, **shown, **override)
        if JUDGE.value is not None:
            sampling = sampling.led(towards.load(JUDGE.value), PULL.value)
        if sampling.stochastic and SEED.value is None:
            print(
                "the solver adds noise and no --seed was given: seeds are 0, 1 ...", file=sys.stderr
            )
        given = dict(
            images=IMAGE.value,
            masks=MASK.value,
            maps=MAP.value,
            boxes=BOXES.value,
            examples=EXAMPLES.value,
            embedding=build.embedding(CLIP.value, FEATURES.value, EXAMPLES.value),
            source=SOURCE.value,
            strength=STRENGTH.value,
            margins=cli.whole_numbers(MARGINS),
            size=cli.whole_numbers(SIZE),
            repaint=cli.whole_numbers(REPAINT),
            frames=FRAMES.value,
            weights=cli.weights(WEIGHT),
            towards=TOWARDS.value,
        )
        words = dict(
            prompts=cli.texts(PROMPT.value), labels=LABEL.value, n=N.value, seed=SEED.value or 0
        )
        batch, seeds, task, captions = build.ask(pipeline, sampling, TASK.value, **words, **given)
        against = None
        if negative is not None:
            against = pipeline.prompts([negative] * len(seeds), beside=pipeline.model.fields)
        bar = tqdm(unit="step", delay=0.5)

        def tick(done, steps):
            bar.total = steps
            bar.update(done - bar.n)

        parts = pipeline.drawer(sampling, BATCH.value, tick)(batch, seeds, against, task)
        out = Path(OUT.value or Path(WORKDIR.value) / "samples")
        out.mkdir(parents=True, exist_ok=True)

    with bar:
        drawn = list(parts)
    images = media.to_uint8(np.concatenate([part.x for part in drawn]))
    about = pipeline.provenance(sampling) | {"workdir": WORKDIR.value}
    about |= {} if negative is None else {"negative": negative}
    about |= {} if TASK.value == "text" else {"task": TASK.value}
    for i, (image, seed) in enumerate(zip(images, seeds, strict=True)):
        chunks = about | {"seed": str(seed)} | ({"prompt": captions[i]} if captions else {})
        media.save_png(out / f"{i:05d}.png", image, chunks)
    if drawn[0].source is not None:
        for i, image in enumerate(media.to_uint8(np.concatenate([part.source for part in drawn]))):
            media.save_png(out / f"{i:05d}_source.png", image, about)
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
