"""The entry point: writes the pictures and the page."""

import sys
from pathlib import Path

from absl import flags

from ldm_jax import cli

FLAGS = flags.FlagValues()
WORKDIR = flags.DEFINE_string("workdir", None, "a run: text to `shapes`", flag_values=FLAGS)
OUT = flags.DEFINE_string("out", "docs/gallery", "the folder for the pictures", flag_values=FLAGS)
N = flags.DEFINE_integer("n", 48, "pictures a figure", lower_bound=8, flag_values=FLAGS)
STEPS = flags.DEFINE_integer("steps", 24, "steps of the solver", lower_bound=8, flag_values=FLAGS)
GUIDANCE = flags.DEFINE_float("guidance", 6.0, "its scale", flag_values=FLAGS)


def main(argv: list[str]) -> None:
    cli.compile_cache()
    with cli.plain_errors():
        cli.nothing_more(argv, "the prompts are those of this file and of the data")
        cli.required(WORKDIR)
        from ldm_jax import media
        from ldm_jax.gallery.more import MORE
        from ldm_jax.gallery.parts import PARTS
        from ldm_jax.gallery.scene import scene

        options = dict(steps=STEPS.value, guidance=GUIDANCE.value)
        of = scene(WORKDIR.value, N.value, options)
    out = Path(OUT.value)
    page = [
        "# Gallery\n\nMade by `make gallery` (`python -m ldm_jax.gallery`) with the demo's model of 5.0 M parameters, "
        f"32x32 pixels, at step {of.pipe.step}: {STEPS.value} steps, guidance {GUIDANCE.value:g}. Figures are by the "
        "rule-based reader of `metrics/shape_reader.py`; tasks that begin with a picture are given real ones of the "
        "validation split, in which one object is to have another colour or another shape. Commands show the flags.\n"
    ]
    for part in (make(of) for make in PARTS + MORE):
        sheet = part.images
        if part.columns:
            sheet = media.grid(part.images, columns=part.columns, captions=part.captions, scale=3)
        media.save_png(out / f"{part.name}.png", sheet)
        about = dict(steps=STEPS.value, guidance=f"{GUIDANCE.value:g}")
        settings = " ".join(f"--{k} {v}" for k, v in about.items())
        page.append(
            f"## {part.title}\n\n![{part.title}]({out.name}/{part.name}.png)\n\n{part.text}\n\n```sh\n"
            f"python sample.py --workdir runs/demo/model {settings} \\\n    {part.command}\n```\n"
        )
        print(part.title, part.text, sep="\n", end="\n\n", flush=True)
    out.with_suffix(".md").write_text("\n".join(page))
    print(out.with_suffix(".md"))


if __name__ == "__main__":
    cli.run(main, FLAGS)
    sys.exit(0)
