"""The checkpoints of a run: what there is, whether it is sound, and its parameters as safetensors files.

    python -m ldm_jax.checkpoint list runs/demo/model
    python -m ldm_jax.checkpoint verify runs/demo/model       # exit status 1 if a step is damaged
    python -m ldm_jax.checkpoint export runs/demo/model --out ema.safetensors
    python -m ldm_jax.checkpoint export runs/demo/model --step 2000 --of params --out params.safetensors
    python -m ldm_jax.checkpoint average runs/demo/model --steps 1000,1500,2000 --out average.safetensors
    python -m ldm_jax.checkpoint average runs/demo/model --sigma_rel 0.08 --out posthoc.safetensors

Tensors have the names of the leaves ("network/conv_in/kernel"). `average` is the mean of several steps, computed in
float64 (a model soup: Wortsman et al. 2022; of one run: Izmailov et al. 2018); or, with --sigma_rel, the power-function
average of that width at --step, from those of other widths in the checkpoints up to it (Karras et al. 2024), of a run
with `optimizer.ema = dict(power=(0.05, 0.1))`. Of a run with several averages --ema names one. Nothing is moved or
changed.
"""

import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import numpy as np
from absl import flags
from tqdm import tqdm

from ldm_jax import cli
from ldm_jax.training import averages, manifest, posthoc, reading
from ldm_jax.weights import files

FLAGS = flags.FlagValues()
STEP = flags.DEFINE_integer(
    "step", None, "of export, and of --sigma_rel; None: the newest that is sound", flag_values=FLAGS
)
STEPS = flags.DEFINE_list("steps", None, "of average: 1000,2000", flag_values=FLAGS)
OF = flags.DEFINE_enum(
    "of", "ema", ["ema", "params"], "the moving average or the parameters", flag_values=FLAGS
)
EMA = flags.DEFINE_string(
    "ema", None, "which average, by name, of a run that keeps several", flag_values=FLAGS
)
SIGMA_REL = flags.DEFINE_float(
    "sigma_rel", None, "of average: the width of the one that is wanted", flag_values=FLAGS
)
OUT = flags.DEFINE_string("out", None, "the .safetensors file to write", flag_values=FLAGS)

VERBS = ("list", "verify", "export", "average")
ITEMS = {"ema": "ema", "params": "state"}  # where a step has them


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


def part_of(path: Path) -> tuple[Path, str | None]:
    """What --of and --ema say of a step's folder: an item, and the part of it.

    Raises:
      ValueError: there are several averages and none is named, or there is none of that name.
    """
    if OF.value == "params":
        return path / "state", "params"
    names = averages.named(reading.keys(path / "ema"))
    if (EMA.value is None and names) or (EMA.value is not None and EMA.value not in names):
        held = (
            f"the averages {', '.join(names)}; name one by --ema" if names else "one average alone"
        )
        raise ValueError(f"{path} holds {held}")
    return path / "ema", EMA.value


def export(workdir: str, step: int | None) -> list[int]:
    """Writes one step; which one."""
    folder, step = reading.sound_step(workdir, step, ITEMS[OF.value])
    _write(reading.arrays(*part_of(folder / str(step))), workdir, [step])
    return [step]


def average(workdir: str, steps: Sequence[int]) -> list[int]:
    """Writes the mean of several steps.

    Raises:
      ValueError: fewer than two steps, or steps of other names or shapes.
    """
    if len(steps) < 2:
        raise ValueError(f"--steps={','.join(map(str, steps))} must be two steps or more")
    places = []
    for step in steps:
        folder, _ = reading.sound_step(workdir, step, ITEMS[OF.value])
        places.append(part_of(folder / str(step)))
    _write(_sum(places, [1 / len(steps)] * len(steps)), workdir, steps)
    return list(steps)


def posthoc_average(workdir: str, sigma_rel: float, step: int | None) -> tuple[list[int], float]:
    """Writes the average of a width at a step; the steps that it is made of, and how far its profile is off.

    Steps that are damaged are passed over.

    Raises:
      ValueError: no such width, or checkpoints without power-function averages.
    """
    gamma = posthoc.exponent(sigma_rel)
    folder, last = reading.sound_step(workdir, step, "ema")
    kept, places, passed = [], [], []
    for at in manifest.steps(folder):
        if not 0 < at <= last:
            continue
        if wrong := manifest.problem(folder / str(at), "ema"):
            passed.append(f"step {at} is damaged ({wrong})")
            continue
        for name in averages.named(reading.keys(folder / str(at) / "ema")):
            if (width := averages.width(name)) is not None:
                kept.append(posthoc.Profile(at, posthoc.exponent(width)))
                places.append((folder / str(at) / "ema", name))
    if not kept:
        raise ValueError(
            f"the checkpoints of {workdir} hold no power-function averages from step 1 on; train with "
            "optimizer.ema = dict(power=(0.05, 0.1)), and log.keep_every for the steps that stay"
        )
    reading.tell(folder, last, passed)
    weights, off = posthoc.weights(kept, posthoc.Profile(last, gamma))
    steps = sorted({profile.step for profile in kept})
    _write(_sum(places, weights), workdir, steps, sigma_rel=str(sigma_rel), step=str(last))
    return steps, off


def _sum(
    places: Sequence[tuple[Path, str | None]], weights: Sequence[float]
) -> dict[str, np.ndarray]:
    """The weighted sum of parts of several steps, one in memory at a time, in float64 and then in their own type.

    Raises:
      ValueError: they are of other names or shapes.
    """
    total, kinds = {}, {}
    for (path, part), weight in tqdm(zip(places, weights, strict=True), total=len(places)):
        arrays = reading.arrays(path, part)
        shapes = {name: (array.dtype, array.shape) for name, array in arrays.items()}
        if kinds and shapes != kinds:
            raise ValueError(
                f"{places[0][0].parent} and {path.parent} hold other arrays; give the steps of one run"
            )
        kinds = shapes
        for name, array in arrays.items():
            total[name] = total.get(name, 0.0) + weight * np.asarray(array, np.float64)
    return {name: of.astype(kinds[name][0]) for name, of in total.items()}


def _write(arrays: dict[str, np.ndarray], workdir: str, steps: Sequence[int], **more: str) -> None:
    about = {"workdir": workdir, "steps": ",".join(map(str, steps)), "of": OF.value}
    files.write(OUT.value, arrays, about | more)


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
            if verb == "average" and SIGMA_REL.value is not None:
                if STEPS.value is not None or EMA.value is not None or OF.value != "ema":
                    raise ValueError(
                        "--sigma_rel is made of all power-function averages up to --step; leave out --steps, --ema and "
                        "--of"
                    )
                written, off = posthoc_average(workdir, SIGMA_REL.value, STEP.value)
                print(f"the profile of sigma_rel {SIGMA_REL.value} is met within {off:.2%}")
            elif verb == "average":
                cli.required(STEPS)
                written = average(workdir, cli.whole_numbers(STEPS))
            else:
                written = export(workdir, STEP.value)
            print(f"{OUT.value}: {OF.value} of step {', '.join(map(str, written))}")


if __name__ == "__main__":
    cli.run(main, FLAGS)
    sys.exit(0)
