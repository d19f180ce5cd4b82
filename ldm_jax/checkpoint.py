"""The checkpoints of a run: what there is, whether it is sound, and its parameters as safetensors files.

    python -m ldm_jax.checkpoint list runs/demo/model
    python -m ldm_jax.checkpoint verify runs/demo/model       # exit status 1 if a step is damaged
    python -m ldm_jax.checkpoint export runs/demo/model --out ema.safetensors
    python -m ldm_jax.checkpoint export runs/demo/model --step 2000 --of params --out params.safetensors
    python -m ldm_jax.checkpoint average runs/demo/model --steps 1000,1500,2000 --out average.safetensors

Tensors have the names of the leaves ("network/conv_in/kernel"). `average` is the mean of several steps, computed in
float64 (a model soup: Wortsman et al. 2022; of one run: Izmailov et al. 2018). Nothing is moved or changed.
"""

import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import numpy as np
from absl import flags
from tqdm import tqdm

from ldm_jax import cli
from ldm_jax.training import manifest, reading
from ldm_jax.weights import files

FLAGS = flags.FlagValues()
STEP = flags.DEFINE_integer(
    "step", None, "of export; None: the newest that is sound", flag_values=FLAGS
)
STEPS = flags.DEFINE_list("steps", None, "of average: 1000,2000", flag_values=FLAGS)
OF = flags.DEFINE_enum(
    "of", "ema", ["ema", "params"], "the moving average or the parameters", flag_values=FLAGS
)
OUT = flags.DEFINE_string("out", None, "the .safetensors file to write", flag_values=FLAGS)

VERBS = ("list", "verify", "export", "average")
PARTS = {"ema": ("ema", None), "params": ("state", "params")}  # item and its part


def steps_of(workdir: str) -> tuple[Path, list[int]]:
    """Raises: FileNotFoundError: there is no checkpoint."""
    folder = Path(workdir) / reading.FOLDER
    steps = manifest.steps(folder)
    if not steps and not manifest.aside(folder):
        raise FileNotFoundError(f"{workdir} holds no checkpoint; give the --workdir of a train.py")
    return folder, steps


def show(workdir: str) -> None:
    """A line for each step and for what was moved aside."""
    folder, steps = steps_of(workdir)
    for name in [*map(str, steps), *manifest.aside(folder)]:
        path = folder / name
        size = sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
        when = datetime.fromtimestamp(path.stat().st_mtime)
        kind = "durable" if manifest.checked(path) else "no manifest"
        kind = "moved aside" if name.startswith("bad_") else kind
        print(f"{name:>8s}  {size / 1e6:10.1f} MB  {when:%Y-%m-%d %H:%M:%S}  {kind}")


def verify(workdir: str) -> bool:
    """Whether all steps are sound; a line for each."""
    folder, steps = steps_of(workdir)
    sound = True
    for step in tqdm(steps, unit="step"):
        wrong = manifest.problem(folder / str(step))
        sound &= wrong is None
        right = "sound" if manifest.checked(folder / str(step)) else "no manifest, an older run's"
        tqdm.write(f"{step:>8d}  {right if wrong is None else 'damaged: ' + wrong}", sys.stdout)
    return sound


def export(workdir: str, step: int | None) -> list[int]:
    """Writes one step; which one."""
    item, part = PARTS[OF.value]
    folder, step = reading.sound_step(workdir, step, item)
    _write(reading.arrays(folder / str(step) / item, part), workdir, [step])
    return [step]


def average(workdir: str, steps: Sequence[int]) -> list[int]:
    """Writes the mean of several steps.

    Raises:
      ValueError: fewer than two steps, or steps of other names or shapes.
    """
    if len(steps) < 2:
        raise ValueError(f"--steps={','.join(map(str, steps))} must be two steps or more")
    item, part = PARTS[OF.value]
    total, kinds = {}, {}
    for step in tqdm(steps, unit="step"):
        folder, _ = reading.sound_step(workdir, step, item)
        arrays = reading.arrays(folder / str(step) / item, part)
        shapes = {name: (array.dtype, array.shape) for name, array in arrays.items()}
        if kinds and shapes != kinds:
            raise ValueError(
                f"steps {steps[0]} and {step} of {workdir} hold other arrays; give those of one run"
            )
        kinds = shapes
        for name, array in arrays.items():
            total[name] = total.get(name, 0.0) + np.asarray(array, np.float64)
    mean = {name: (of / len(steps)).astype(kinds[name][0]) for name, of in total.items()}
    _write(mean, workdir, steps)
    return list(steps)


def _write(arrays: dict[str, np.ndarray], workdir: str, steps: Sequence[int]) -> None:
    about = {"workdir": workdir, "steps": ",".join(map(str, steps)), "of": OF.value}
    files.write(OUT.value, arrays, about)


def main(argv: list[str]) -> None:
    with cli.plain_errors():
        if len(argv) != 3 or argv[1] not in VERBS:
            raise ValueError(
                f"give one of {', '.join(VERBS)} and a work directory, such as `list runs/demo/model`; see --help"
            )
        verb, workdir = argv[1:]
        if verb == "list":
            show(workdir)
        elif verb == "verify":
            if not verify(workdir):
                sys.exit(1)
        else:
            cli.required(OUT)
            if verb == "average":
                cli.required(STEPS)
                written = average(workdir, cli.whole_numbers(STEPS))
            else:
                written = export(workdir, STEP.value)
            print(f"{OUT.value}: {OF.value} of step {', '.join(map(str, written))}")


if __name__ == "__main__":
    cli.run(main, FLAGS)
    sys.exit(0)
