"""How often a text-to-image model trained on `shapes` draws what the prompt says.

    python -m ldm_jax.evaluate --workdir runs/demo/model --n 256 --out runs/demo/evaluation.json

Pictures are judged by the rules of `metrics/shape_reader.py`, not by a network: a prompt counts when exactly the
objects that it names are there, with their shapes, colours and positions. The prompts are captions of the validation
split, and of the split of combinations that training never saw; a shape is the likeliest of those that the captions of
the validation split name, if it is likely enough. Real pictures and their reconstructions by the codec are
judged by the same rules, since they bound what a model can reach.
"""

import json
import sys
from pathlib import Path

from absl import flags, logging
from tqdm import tqdm

from ldm_jax import cli

FLAGS = flags.FlagValues()
WORKDIR = flags.DEFINE_string(
    "workdir", None, "a run of train.py: text to `shapes`", flag_values=FLAGS
)
N = flags.DEFINE_integer("n", 256, "prompts a split", lower_bound=1, flag_values=FLAGS)
SEED = flags.DEFINE_integer("seed", 0, "the first sample's seed", lower_bound=0, flag_values=FLAGS)
OUT = flags.DEFINE_string(
    "out", None, "the JSON file for the figures; None: WORKDIR/evaluation.json", flag_values=FLAGS
)
GUIDANCE = flags.DEFINE_float(
    "guidance", None, "classifier-free guidance scale; None: the config's", flag_values=FLAGS
)
STEPS = flags.DEFINE_integer(
    "steps", None, "steps of the solver; None: the config's", lower_bound=1, flag_values=FLAGS
)
CHECKPOINT = flags.DEFINE_integer(
    "checkpoint", None, "the checkpoint's step; None: the latest", flag_values=FLAGS
)


def main(argv: list[str]) -> None:
    cli.compile_cache()
    with cli.plain_errors():
        cli.nothing_more(argv, "prompts are the captions of the data")
        cli.required(WORKDIR)
        import numpy as np

        from ldm_jax import build, media
        from ldm_jax.metrics import image, shape_reader

        pipeline = build.pipeline(WORKDIR.value, CHECKPOINT.value)
        override = {
            k: v
            for k, v in dict(guidance=GUIDANCE.value, steps=STEPS.value).items()
            if v is not None
        }
        sampling = build.sampling(WORKDIR.value, pipeline, **override)
        splits = {
            "seen": build.examples(WORKDIR.value, "validation", N.value),
            "unseen": build.examples(WORKDIR.value, "unseen", N.value),
        }

    figures = {}
    real, captions = splits["seen"]
    rebuilt = np.clip(pipeline.reconstruct(real), -1.0, 1.0)
    figures["psnr"] = float(np.mean(image.psnr(real, rebuilt)))
    shapes = shape_reader.named(captions)
    for name, images in (("real", real), ("reconstructed", rebuilt)):
        accuracy = shape_reader.accuracy(media.to_uint8(images), captions, shapes)
        figures[f"accuracy_{name}"] = accuracy
    draw = pipeline.drawer(sampling)
    for name, (_, captions) in splits.items():
        seeds = [SEED.value + i for i in range(N.value)]
        images = []
        with tqdm(total=N.value, unit="sample", desc=name) as bar:
            for drawn in draw(pipeline.prompts(captions), seeds):
                images.append(media.to_uint8(drawn.x))
                bar.update(len(drawn.x))
        images = np.concatenate(images)
        figures[f"accuracy_{name}"] = shape_reader.accuracy(images, captions, shapes)
        first = zip(images[:24], captions[:24], strict=True)
        right = [shape_reader.agrees(image, caption, shapes) for image, caption in first]
        marked = [
            f"{'right' if r else 'WRONG'}: {c}" for r, c in zip(right, captions[:24], strict=True)
        ]
        sheet = media.grid(images[:24], columns=6, captions=marked)
        media.save_png(Path(WORKDIR.value) / f"evaluation_{name}.png", sheet, {"prompts": name})
    figures |= {"prompts": N.value, "step": pipeline.step} | dict(sampling.about)
    out = Path(OUT.value or Path(WORKDIR.value) / "evaluation.json")
    out.write_text(json.dumps(figures, indent=2) + "\n")
    logging.info("wrote %s", out)
    for name, value in figures.items():
        print(f"{name:24s} {value:.4f}" if isinstance(value, float) else f"{name:24s} {value}")


if __name__ == "__main__":
    cli.run(main, FLAGS)
    sys.exit(0)
