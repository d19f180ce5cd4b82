"""The demo: data, autoencoder, text-to-image model, samples and their evaluation, with one command.

    python -m ldm_jax.demo --workdir runs/demo

Every step is a command that a user could type; an interrupted demo goes on where it was. The last line is the path of a
captioned grid of samples; the figures are in `evaluation.json` beside it.
"""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

from absl import flags

from ldm_jax import cli

FLAGS = flags.FlagValues()
WORKDIR = flags.DEFINE_string("workdir", "runs/demo", "where everything goes", flag_values=FLAGS)
ROOT = Path(__file__).parent.parent

PROMPTS = (  # the last three have combinations that the training split never contains
    "a red circle on the left",
    "a large blue square at the top",
    "a small green triangle on the right",
    "a yellow circle to the left of a purple square",
    "a blue triangle above a red square",
    "a green square below a yellow circle",
    "a red triangle at the top",
    "a large blue circle in the middle",
    "a yellow square to the right of a green circle",
)


def command(*arguments: str | Path) -> None:
    """Runs a Python command in the checkout and ends with its status if it fails."""
    shown = " ".join(str(a) for a in arguments)
    print(f"\n$ python {shown}", flush=True)
    # One host device a core: XLA's CPU convolutions run on one thread.
    cores = 2 ** ((len(os.sched_getaffinity(0)) or 1).bit_length() - 1)
    environment = {"JAX_NUM_CPU_DEVICES": str(min(cores, 8)), "PYTHONPATH": str(ROOT)} | os.environ
    done = subprocess.run([sys.executable, *map(str, arguments)], env=environment, check=False)
    if done.returncode:
        sys.exit(done.returncode)


def main(argv: list[str]) -> None:
    began = time.perf_counter()
    work = Path(WORKDIR.value)
    data, autoencoder, model = work / "data", work / "autoencoder", work / "model"
    of_data = f"--config.data.source.data_dir={data}"
    command("-m", "ldm_jax.data.shapes", "--data_dir", data, "--config", "simple")
    command(
        ROOT / "train.py",
        "--config",
        ROOT / "configs/demo_autoencoder.py",
        "--workdir",
        autoencoder,
        of_data,
    )
    command(
        *(ROOT / "train.py", "--config", ROOT / "configs/demo.py", "--workdir", model, of_data),
        f"--config.codec.run={autoencoder}",
    )
    prompts = [flag for prompt in PROMPTS for flag in ("--prompt", prompt)]
    command(
        ROOT / "sample.py",
        "--workdir",
        model,
        *prompts,
        "--n",
        "4",
        "--film",
        "--out",
        work / "samples",
    )
    figures = work / "evaluation.json"
    command("-m", "ldm_jax.evaluate", "--workdir", model, "--out", figures)

    values = json.loads(figures.read_text())
    values["seconds"] = round(time.perf_counter() - began, 1)
    # The largest of the processes, in kilobytes on Linux: they run one after another.
    values["peak_memory_gb"] = round(
        resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20, 2
    )
    figures.write_text(json.dumps(values, indent=2) + "\n")
    (work / "samples/grid.png").replace(work / "samples.png")
    print(json.dumps(values, indent=2))
    print(work / "samples.png")


if __name__ == "__main__":
    cli.run(main, FLAGS)
