"""What benchmarks of models share: their flags, one pinned thread, results that must agree, and where figures go."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

from ldm_jax.measure import models, plot, rival, timing

AGREE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}  # relative


class Asked(NamedTuple):
    """What the flags ask for, checked."""

    subject: models.Subject
    batches: list[int]
    pinned: bool  # to one core


def define(own: flags.FlagValues, batch: str, dtypes: Sequence[str], of_dtype: str) -> None:
    """Adds the flags that every benchmark of models has."""
    flags.DEFINE_string("model", "tiny", "a name, a folder, or a config", flag_values=own)
    flags.DEFINE_list("batch", [batch], "samples at once, such as 1,4,16", flag_values=own)
    flags.DEFINE_enum("dtype", "float32", dtypes, of_dtype, flag_values=own)
    side = "of a latent; the model's own without it"
    flags.DEFINE_integer("side", None, side, lower_bound=1, flag_values=own)
    flags.DEFINE_integer("repeats", 5, "timed runs", lower_bound=1, flag_values=own)
    to = "what to compare with"
    flags.DEFINE_enum("against", None, ("diffusers",), to, flag_values=own)
    where = "a JSON file; a plot is beside it, as .png"
    flags.DEFINE_string("out", None, where, flag_values=own)


def prepare(own: flags.FlagValues) -> Asked:
    """The model and the batches; on a machine without an accelerator a comparison is pinned to one thread.

    Raises:
      ValueError: what was asked for is not there (also as `models.subject`); nothing was compiled.
    """
    batches, pinned = _batches(own.batch), False
    if own.against:
        torch = rival.libraries()[0]
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs some too
        if pinned := timing.pin_without_accelerator():
            torch.set_num_threads(1)
    return Asked(models.subject(own.model, own.dtype), batches, pinned)


def _batches(given: Sequence[str]) -> list[int]:
    if not all(text.isdigit() and int(text) for text in given) or not given:
        raise ValueError(f"--batch={','.join(given)} is no list of numbers such as 1,4,16")
    return [int(text) for text in given]


def clock() -> str:
    """What seconds are compared: of the CPU where it is the device."""
    return "cpu_seconds" if jax.default_backend() == "cpu" else "seconds"


def ratios(
    theirs: Mapping[str, timing.Spent], ours: Mapping[str, timing.Spent]
) -> dict[str, float]:
    """{part: how many times as long theirs takes}, by pairs."""
    which = "busy" if clock() == "cpu_seconds" else "wall"
    return {
        name: timing.ratio(getattr(spent, which), getattr(ours[name], which))
        for name, spent in theirs.items()
    }


def check(by: str, name: str, ours: Any, theirs: Any, dtype: str) -> None:
    """Says how far two arrays, or the farthest two of {name: array}, are from each other, relative to theirs.

    Of several, one of less than a thousandth of the largest is measured by that: a gradient that is zero but for
    rounding, such as that of a bias before a norm, has no figures in common.

    Raises:
      ValueError: too far for the type.
    """

    def distance(a, b):
        return float(np.linalg.norm(np.asarray(a, np.float32) - np.asarray(b, np.float32)))

    apart = jax.tree.leaves(jax.tree.map(distance, ours, theirs))
    sizes = jax.tree.leaves(jax.tree.map(lambda b: distance(b, np.float32(0)), theirs))
    least = 1e-3 * max(sizes)
    error = max(far / max(size, least) for far, size in zip(apart, sizes, strict=True))
    print(f"{by}, {name}: relative error {error:.1e}", file=sys.stderr)
    if not error < AGREE[dtype]:
        raise ValueError(
            f"the {name} of {by} gives something else than ours (relative error {error:.2g})"
        )


def described(subject: models.Subject, own: flags.FlagValues, rate: float) -> dict[str, Any]:
    """What every result says of itself; `rate` is that of a matrix product."""
    return {
        "command": " ".join(["python -m ldm_jax.benchmark", *sys.argv[1:]]),
        "model": subject.name,
        "dtype": own.dtype,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "matmul_tflops": rate / 1e12,
    }


def counted(flops: int, summary: Mapping[str, float], rate: float) -> dict[str, Any]:
    """Operations, and how fast they were."""
    a_second = flops / summary[clock()]
    return {"flops": flops, "tflops": a_second / 1e12, "of_matmul_rate": a_second / rate}


def write(out: str, result: Any, title: str, rows: Sequence[tuple[str, float]], unit: str) -> None:
    """The JSON file, and bars beside it."""
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    plot.bars(path.with_suffix(".png"), title, rows, unit)
