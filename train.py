"""Trains either stage: an autoencoder, or a diffusion model in its latent space.

    python train.py --config configs/demo_autoencoder.py --workdir runs/demo/autoencoder
    python train.py --config configs/demo.py --workdir runs/demo/model --config.optimizer.lr=5e-4

The same command resumes. Ctrl-C or SIGTERM saves first.
"""

import sys
import time

from absl import flags, logging
from ml_collections import config_flags

from ldm_jax import cli, heap

FLAGS = flags.FlagValues()
CONFIG = config_flags.DEFINE_config_file(
    "config", None, "the run: a file in configs/", flag_values=FLAGS, lock_config=True
)
WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "where the run lives: config, checkpoints, metrics, pictures",
    flag_values=FLAGS,
)
PROFILE = flags.DEFINE_string(
    "profile", None, "START:STOP, steps to trace into WORKDIR/profile", flag_values=FLAGS
)


def main(argv: list[str]) -> None:
    began = time.perf_counter()
    heap.keep()
    cli.compile_cache()
    with cli.plain_errors():
        cli.nothing_more(argv, "a config value is set by --config.NAME=VALUE")
        cli.required(CONFIG, WORKDIR)
        from ldm_jax import build
        from ldm_jax.training import checkpoints, loop, profile

        traced = profile.steps_of(PROFILE.value)
        run = build.run(CONFIG.value, WORKDIR.value)
    try:
        reached = loop.train(run, WORKDIR.value, began, traced)
    except (loop.TrainingStopped, checkpoints.Unreadable, checkpoints.SaveFailed) as error:
        cli.fail(str(error))
    logging.info("%s is at step %d of %d", WORKDIR.value, reached, run.steps)


if __name__ == "__main__":
    cli.run(main, FLAGS)
    sys.exit(0)
