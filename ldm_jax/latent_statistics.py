"""What the latents of a trained autoencoder look like: means, deviations, and the scale of a diffusion model.

    python -m ldm_jax.latent_statistics --workdir runs/kl_f8 --n 1024

Of the run's validation data, by its moving average; a KL autoencoder's posterior is sampled, as a diffusion model sees
it, and a VQ autoencoder's latents are those before quantisation. `scale` is 1 over the deviation of all channels
together: what `codec.from_autoencoder` multiplies by, and what is called `scale_factor` elsewhere.
"""

import json
import sys
from pathlib import Path

from absl import flags, logging

from ldm_jax import cli

FLAGS = flags.FlagValues()
WORKDIR = flags.DEFINE_string("workdir", None, "the run of an autoencoder", flag_values=FLAGS)
N = flags.DEFINE_integer("n", 1024, "pictures", lower_bound=1, flag_values=FLAGS)
BATCH = flags.DEFINE_integer("batch", 32, "pictures at a time", lower_bound=1, flag_values=FLAGS)
SEED = flags.DEFINE_integer("seed", 0, "of the posterior's samples", 0, flag_values=FLAGS)
CHECKPOINT = flags.DEFINE_integer(
    "checkpoint", None, "the checkpoint's step; None: the latest", flag_values=FLAGS
)
OUT = flags.DEFINE_string(
    "out", None, "the JSON file; None: WORKDIR/latents.json", flag_values=FLAGS
)


def main(argv: list[str]) -> None:
    cli.compile_cache()
    with cli.plain_errors():
        cli.nothing_more(argv, "all are flags")
        cli.required(WORKDIR)
        from ldm_jax import build

        measure = build.latent_statistics(WORKDIR.value, N.value, BATCH.value, CHECKPOINT.value)
    figures = measure(SEED.value)
    out = Path(OUT.value or Path(WORKDIR.value) / "latents.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(figures, indent=2) + "\n")
    logging.info("wrote %s", out)
    print(line(figures))


def line(figures: dict) -> str:
    """All in one line."""
    each = ", ".join(
        f"{mean:.3f} ± {std:.3f}"
        for mean, std in zip(figures["channel_mean"], figures["channel_std"], strict=True)
    )
    codes = ""
    if "usage" in figures:
        codes = (
            f"; {figures['usage']:.1%} of the codes used, perplexity {figures['perplexity']:.1f}"
        )
    return (
        f"scale {figures['scale']:.5f} (mean {figures['mean']:.4f}, deviation {figures['std']:.4f}; "
        f"channels {each}{codes}; {figures['pictures']} pictures, step {figures['step']})"
    )


if __name__ == "__main__":
    cli.run(main, FLAGS)
    sys.exit(0)
