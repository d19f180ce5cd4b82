"""Trains either stage: an autoencoder, or a diffusion model in its latent space.

    python train.py --config configs/demo_autoencoder.py --workdir runs/demo/autoencoder
    python train.py --config configs/demo.py --workdir runs/demo/model --config.optimizer.lr=5e-4

The same command resumes. Ctrl-C or SIGTERM saves first, a second one does not. Of several processes each gets the same
command; docs/scale.md shows how.
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
DISTRIBUTED = flags.DEFINE_boolean(
    "distributed",
    False,
    "one of several processes, told so by SLURM, Open MPI, GKE or a TPU pod",
    flag_values=FLAGS,
)
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT where process 0 listens", flag_values=FLAGS
)
PROCESS_ID = flags.DEFINE_integer("process_id", None, "which process this is", flag_values=FLAGS)
NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "how many processes train together", flag_values=FLAGS
)


def main(argv: list[str]) -> None:
    began = time.perf_counter()
    heap.keep()
    cli.compile_cache()
    with cli.plain_errors():
        cli.nothing_more(argv, "a config value is set by --config.NAME=VALUE")
        cli.required(CONFIG, WORKDIR)
        from ldm_jax import build
        from ldm_jax.training import checkpoints, interrupt, loop, processes, profile

        processes.meet(DISTRIBUTED.value, COORDINATOR.value, PROCESS_ID.value, NUM_PROCESSES.value)
        traced = profile.steps_of(PROFILE.value)
        with interrupt.Interrupt().watch() as signals, signals.beginning():
            run = build.run(CONFIG.value, WORKDIR.value)
    try:
        reached = loop.train(run, WORKDIR.value, began, traced)
    except (loop.TrainingStopped, checkpoints.Unreadable, checkpoints.SaveFailed) as error:
        cli.fail(str(error))
    logging.info("%s is at step %d of %d", WORKDIR.value, reached, run.steps)


if __name__ == "__main__":
    cli.run(main, FLAGS)
    sys.exit(0)
