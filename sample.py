"""Samples from a trained diffusion model; reads `config.json` and a checkpoint of the work directory, never code.

    python sample.py --workdir runs/demo/model --prompt "a red circle on the left" --n 4 --film
    python sample.py --workdir runs/faces --n 16 --solver dpmpp_2m --steps 20 --seed 7

Writes one PNG a sample (its provenance in the text chunks), `grid.png` with captions, and with --film `film.png`: the
estimate of the clean picture on the way from noise.
"""

import sys
from pathlib import Path

from absl import flags, logging
from tqdm import tqdm

from ldm_jax import cli

WORKDIR = flags.DEFINE_string("workdir", None, "a run of train.py")
PROMPT = flags.DEFINE_multi_string(
    "prompt", [], "a prompt, or a file with one prompt a line; may be repeated"
)
LABEL = flags.DEFINE_multi_string("label", [], "a class, by name or number; may be repeated")
N = flags.DEFINE_integer("n", 1, "samples a prompt or label", lower_bound=1)
SOLVER = flags.DEFINE_string(
    "solver", None, "a solver of ldm_jax/diffusion/solvers; None: the config's"
)
STEPS = flags.DEFINE_integer(
    "steps", None, "steps of the solver; None: the config's", lower_bound=1
)
GUIDANCE = flags.DEFINE_float(
    "guidance", None, "classifier-free guidance scale; None: the config's"
)
SEED = flags.DEFINE_integer(
    "seed", 0, "the first sample's seed; the others count on", lower_bound=0
)
STEP = flags.DEFINE_integer("checkpoint", None, "the checkpoint's step; None: the latest")
BATCH = flags.DEFINE_integer("batch", 64, "samples drawn at once", lower_bound=1)
FILM = flags.DEFINE_bool("film", False, "also draw the way from noise to picture")
OUT = flags.DEFINE_string("out", None, "a folder for the pictures; None: WORKDIR/samples")


def prompts() -> list[str]:
    """The prompts of the flags, files read."""
    found = []
    for given in PROMPT.value:
        path = Path(given)
        is_file = len(given) < 255 and path.suffix and path.is_file()
        found += (
            [line for line in path.read_text().splitlines() if line.strip()] if is_file else [given]
        )
    return found


def main(argv: list[str]) -> None:
    cli.compile_cache()
    with cli.plain_errors():
        if len(argv) > 1:
            raise ValueError(f"unknown arguments {argv[1:]}; a prompt is given by --prompt TEXT")
        import numpy as np

        from ldm_jax import build, media

        texts, labels = prompts(), LABEL.value
        if texts and labels:
            raise ValueError("give --prompt or --label, not both")
        pipeline = build.pipeline(WORKDIR.value, STEP.value)
        captions = [c for c in texts or labels for _ in range(N.value)]
        if texts:
            batch = pipeline.prompts(captions)
        elif labels:
            batch = pipeline.labels(captions)
        else:
            batch = pipeline.unconditional(N.value)
        flagged = dict(solver=SOLVER.value, steps=STEPS.value, guidance=GUIDANCE.value)
        override = {k: v for k, v in flagged.items() if v is not None}
        sampling = build.sampling(WORKDIR.value, pipeline, film=FILM.value, **override)
        out = Path(OUT.value or Path(WORKDIR.value) / "samples")
        out.mkdir(parents=True, exist_ok=True)

    seeds = [SEED.value + i for i in range(len(next(iter(batch.values()))))]
    images, films = [], []
    with tqdm(total=len(seeds), unit="sample") as bar:
        for drawn in pipeline.drawer(sampling, BATCH.value)(batch, seeds):
            images.append(media.to_uint8(drawn.x))
            films.append(drawn.film)
            bar.update(len(drawn.x))
    images = np.concatenate(images)
    about = pipeline.provenance(sampling) | {"workdir": WORKDIR.value}
    for i, (image, seed) in enumerate(zip(images, seeds, strict=True)):
        text = about | {"seed": str(seed)} | ({"prompt": captions[i]} if captions else {})
        media.save_png(out / f"{i:05d}.png", image, text)
    columns = N.value if captions and N.value > 1 else int(np.ceil(np.sqrt(len(images))))
    media.save_png(
        out / "grid.png", media.grid(images, columns=columns, captions=captions or None), about
    )
    if FILM.value:
        film = media.to_uint8(np.concatenate(films, axis=1))
        strips = film.swapaxes(0, 1).reshape(-1, *film.shape[2:])
        media.save_png(out / "film.png", media.grid(strips, columns=len(film)), about)
    logging.info("%d samples", len(images))
    print(out / "grid.png")


if __name__ == "__main__":
    flags.mark_flags_as_required(["workdir"])
    cli.run(main)
    sys.exit(0)
