"""The demo: data, autoencoder, text-to-image model, samples and their evaluation, with one command.

    python -m ldm_jax.demo --workdir runs/demo

Every step is a command that a user could type; an interrupted demo goes on where it was. The last line is the path of a
captioned grid of samples; the figures are in `evaluation.json` beside it.
"""

import json
import os
import resource
import signal
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
    "a red cross on the left",
    "a large blue square at the top",
    "a small green triangle on the right",
    "a yellow cross to the left of a purple square",
    "a blue triangle above a red square",
    "a green square below a yellow cross",
    "a red triangle at the top",
    "a large blue cross in the middle",
    "a yellow square to the right of a green cross",
)


def command(*arguments: str | Path) -> None:
    """Runs a Python command in the checkout and ends with its status if it fails.

    Ctrl-C and SIGTERM are left to the command, which knows what to save.
    """
    shown = " ".join(str(a) for a in arguments)
    print(f"\n$ python {shown}", flush=True)
    # One host device a core: XLA's CPU convolutions run on one thread.
    cores = 2 ** ((len(os.sched_getaffinity(0)) or 1).bit_length() - 1)
    environment = {"JAX_NUM_CPU_DEVICES": str(min(cores, 8)), "PYTHONPATH": str(ROOT)} | os.environ
    # A terminal sends SIGINT to the command as well.
    interrupted = signal.signal(signal.SIGINT, lambda *_: None)
    with subprocess.Popen([sys.executable, *map(str, arguments)], env=environment) as running:
        terminated = signal.signal(signal.SIGTERM, lambda number, _: running.send_signal(number))
        status = running.wait()
    signal.signal(signal.SIGINT, interrupted)
    signal.signal(signal.SIGTERM, terminated)
    if status:
        sys.exit(status)


def train(config: str, workdir: Path, *flags: str) -> None:
    """Trains to the end of a config; an interrupted training ends the demo."""
    command(ROOT / "train.py", "--config", ROOT / "configs" / config, "--workdir", workdir, *flags)
    steps = json.loads((workdir / "config.json").read_text())["steps"]
    if not (workdir / "checkpoints" / str(steps)).is_dir():
        sys.exit(f"the training in {workdir} was stopped; the same command goes on with it")


def main(argv: list[str]) -> None:
    began = time.perf_counter()
    work = Path(WORKDIR.value)
    data, autoencoder, model = work / "data", work / "autoencoder", work / "model"
    of_data = f"--config.data.source.data_dir={data}"
    command("-m", "ldm_jax.data.shapes", "--data_dir", data, "--config", "simple")
    train("demo_autoencoder.py", autoencoder, of_data)
    train("demo.py", model, of_data, f"--config.codec.run={autoencoder}")
    prompts = [flag for prompt in PROMPTS for flag in ("--prompt", prompt)]
    samples = ("--n", "4", "--film", "--out", work / "samples")
    command(ROOT / "sample.py", "--workdir", model, *prompts, *samples)
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
