"""How fast a model draws: the condition, the loop over the network, the decoder, and all of them as one program.

    python -m ldm_jax.benchmark sampler --model sd15 --steps 50 --batch 1,4,16 --dtype bfloat16 --out results.json
    python -m ldm_jax.benchmark sampler --model tiny --steps 10 --against diffusers --out results.json

Models: "sd15", "sdxl" and "ldm4" (the latent diffusion model of ImageNet's classes) at their published sizes; "tiny"
and "small", reduced Stable Diffusion 1.5 (16x16 latents, widths 64/128/256; 32x32, 128/256/512/512); or the folder of
a model. Weights are random where none are given: time does not depend on them. Every program is compiled ahead, runs
once to warm up, and is waited for; inputs are on the device. Rates are by our own count of operations
(`ldm_jax.flops`), and a share is that of the rate of a large matrix product, measured on the same device in the same
type.

With --against diffusers the same networks, weights and steps run in torch, in turn with ours, after their results have
been compared; ratios are medians over pairs (above 1: ours is faster). On a GPU that is torch as it is and with
`torch.compile`. Without an accelerator everything runs on one pinned thread and seconds are those of the CPU.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

from ldm_jax import flops
from ldm_jax.measure import models, plot, programs, rival, timing

FLAGS = flags.FlagValues()
MODEL = flags.DEFINE_string("model", "tiny", "a name or a folder", flag_values=FLAGS)
SOLVER = flags.DEFINE_string("solver", "ddim", "by its name", flag_values=FLAGS)
STEPS = flags.DEFINE_integer("steps", 50, "of the solver", lower_bound=1, flag_values=FLAGS)
GUIDANCE = flags.DEFINE_float("guidance", 7.5, "its scale; 1: none", flag_values=FLAGS)
BATCH = flags.DEFINE_list("batch", ["1"], "pictures at once, such as 1,4,16", flag_values=FLAGS)
DTYPE = flags.DEFINE_enum(
    "dtype",
    "float32",
    ("float32", "bfloat16", "float16"),
    "of parameters and computation",
    flag_values=FLAGS,
)
SIDE = flags.DEFINE_integer(
    "side", None, "of a latent; the model's own without it", lower_bound=1, flag_values=FLAGS
)
REPEATS = flags.DEFINE_integer("repeats", 5, "timed runs", lower_bound=1, flag_values=FLAGS)
AGAINST = flags.DEFINE_enum(
    "against", None, ("diffusers",), "what to compare with", flag_values=FLAGS
)
OUT = flags.DEFINE_string(
    "out", None, "a JSON file; a plot is beside it, as .png", flag_values=FLAGS
)

PARTS = ("text", "loop", "decode", "together")
AGREE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}  # relative, of latents and of images


class Asked(NamedTuple):
    """What the flags ask for, checked."""

    subject: models.Subject
    batches: list[int]
    pinned: bool  # to one core


def prepare() -> Asked:
    """The model and the batches; on a machine without an accelerator a comparison is pinned to one thread.

    Raises:
      ValueError: what was asked for is not there (also as `models.subject`, `programs.check`, `rival.check`); nothing
        was compiled.
    """
    batches, pinned = _batches(), False
    if AGAINST.value:
        torch = rival.libraries()[0]
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs some too
        if pinned := timing.pin_without_accelerator():
            torch.set_num_threads(1)
    subject = models.subject(MODEL.value, DTYPE.value)
    programs.check(subject, SOLVER.value, STEPS.value)
    if AGAINST.value:
        rival.check(subject, SOLVER.value)
    return Asked(subject, batches, pinned)


def main(asked: Asked) -> None:
    """Measures, prints a table, and writes what --out names."""
    result = run(asked.subject, asked.batches) | {"one_pinned_thread": asked.pinned}
    print(table(result))
    if OUT.value:
        path = Path(OUT.value)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")
        clock = _clock()
        rows = [
            (f"{row['by']}, batch {row['batch']}", row["batch"] / row["together"][clock])
            for row in result["rows"]
        ]
        title = f"{result['model']}, {result['steps']} steps, {result['dtype']}, {result['device']}"
        plot.bars(path.with_suffix(".png"), title, rows, "images/s")


def _batches() -> list[int]:
    if not all(given.isdigit() and int(given) for given in BATCH.value) or not BATCH.value:
        raise ValueError(f"--batch={','.join(BATCH.value)} is no list of numbers such as 1,4,16")
    return [int(given) for given in BATCH.value]


def _clock() -> str:
    """What seconds are compared: of the CPU where it is the device."""
    return "cpu_seconds" if jax.default_backend() == "cpu" else "seconds"


def run(subject: models.Subject, batches: list[int]) -> dict[str, Any]:
    """Everything that is measured.

    Raises:
      ValueError: torch's results are not ours.
    """
    rate = timing.matmul_rate(DTYPE.value)
    rows = [row for batch in batches for row in measure(subject, batch, rate)]
    return {
        "command": " ".join(["python -m ldm_jax.benchmark", *sys.argv[1:]]),
        "model": subject.name,
        "solver": SOLVER.value,
        "steps": STEPS.value,
        "guidance": GUIDANCE.value,
        "dtype": DTYPE.value,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "matmul_tflops": rate / 1e12,
        "rows": rows,
    }


def measure(subject: models.Subject, batch: int, rate: float) -> list[dict[str, Any]]:
    """A row for us, and one for each rival."""
    side = SIDE.value or subject.side
    made = programs.programs(subject, SOLVER.value, STEPS.value, GUIDANCE.value, batch, side)
    together, compiling = timing.compile_seconds(made["together"][0], *made["together"][1])
    compiled = {n: f.lower(*args).compile() for n, (f, args) in made.items() if n != "together"}
    compiled["together"] = together

    def ours(name: str) -> Callable[[], Any]:
        return lambda: jax.block_until_ready(compiled[name](*made[name][1]))

    runs = {"ldm_jax": {name: ours(name) for name in PARTS}}
    if AGAINST.value:
        runs |= _rivals(subject, made, runs["ldm_jax"])
    spent = {
        name: timing.interleaved({by: parts[name] for by, parts in runs.items()}, REPEATS.value)
        for name in PARTS
    }
    rows = []
    for by in runs:
        row = {"by": by, "batch": batch, "side": side}
        row |= {name: spent[name][by].summary() for name in PARTS}
        row["step_seconds"] = row["loop"]["seconds"] / STEPS.value
        row["images_per_second"] = batch / row["together"]["seconds"]
        if by == "ldm_jax":
            row |= compiling | timing.memory(together)
            for name in PARTS:
                counted = flops.flops(*(made[name][0], *made[name][1]))
                row[name] |= {"flops": counted, "xla_flops": timing.xla_flops(compiled[name])}
                row[name]["tflops"] = counted / row[name][_clock()] / 1e12
                row[name]["of_matmul_rate"] = counted / row[name][_clock()] / rate
        else:
            which = "busy" if _clock() == "cpu_seconds" else "wall"
            row["ratio"] = {
                name: timing.ratio(
                    getattr(spent[name][by], which), getattr(spent[name]["ldm_jax"], which)
                )
                for name in PARTS
            }
        rows.append(row)
    return rows


def _rivals(subject, made, ours):
    """Those of torch, whose latents and images are ours.

    Raises:
      ValueError: they are not.
    """
    given = made["text"][1][1]
    conds, start = made["loop"][1][1:3]
    ids = [given[field] for field in sorted(given) if field.startswith("tokens")]
    args = dict(ids=ids, start=start, scale=GUIDANCE.value, sizes=given.get("sizes"))
    kinds = {"diffusers": False}
    if jax.default_backend() == "gpu":
        kinds["diffusers compiled"] = True
    found = {
        by: rival.parts(subject, DTYPE.value, conds, args, STEPS.value, compiled)
        for by, compiled in kinds.items()
    }
    results = {name: ours[name]() for name in ("text", "loop", "decode")}
    results["text"] = results["text"][0].tokens
    for by, parts in found.items():
        for name, result in results.items():
            theirs = parts[name]()
            if name == "text":
                if len(theirs) > 1:
                    continue  # of two encoders they give more than is read
                theirs = theirs[0][: len(start)]
            a, b = np.asarray(result, np.float32), rival.array(theirs)
            error = float(np.linalg.norm(a - b) / np.linalg.norm(b))
            print(f"{by}, {name}: relative error {error:.1e}", file=sys.stderr)
            if not error < AGREE[DTYPE.value]:
                raise ValueError(
                    f"the {name} of {by} gives something else than ours (relative error {error:.2g})"
                )
    return found


def table(result: dict[str, Any]) -> str:
    """The result as people read it."""
    clock = "CPU s" if _clock() == "cpu_seconds" else "s"
    lines = [
        f"\n{result['model']}, {result['solver']}, {result['steps']} steps, guidance {result['guidance']}, "
        f"{result['dtype']}, {result['device']}, jax {result['jax']}, "
        f"matrix product {result['matmul_tflops']:.3g} TFLOP/s\n",
        f"| by | batch | step, {clock} | text | loop | decode | together | p90, s | images/s | TFLOP/image | TFLOP/s "
        "(share) | compile, cached, s | GB |",
        "|---" * 13 + "|",
    ]
    for row in result["rows"]:
        each = [row[name][_clock()] for name in PARTS]
        cells = [row["by"], str(row["batch"]), f"{each[1] / result['steps']:.4g}"]
        cells += [f"{seconds:.4g}" for seconds in each]
        cells += [f"{row['together']['seconds_p90']:.4g}", f"{row['batch'] / each[3]:.4g}"]
        if "ratio" in row:
            lines.append("| " + " | ".join([*cells, "", "", "", ""]) + " |")
            shown = ", ".join(f"{name} {row['ratio'][name]:.2f}" for name in PARTS)
            lines.append(f"| of ours, by pairs: {shown} |" + " |" * 12)
            continue
        whole = row["together"]
        peak = row.get("peak_bytes", row["program_bytes"])
        cells += [
            f"{whole['flops'] / row['batch'] / 1e12:.4g}",
            f"{whole['tflops']:.3g} ({whole['of_matmul_rate']:.2f})",
            f"{row['compile_seconds']:.1f}, {row['compile_seconds_cached']:.1f}",
            f"{peak / 1e9:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
