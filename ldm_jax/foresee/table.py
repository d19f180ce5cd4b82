"""What was compiled ahead of time, as one table: a row for each file of figures in a folder."""

import json
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

BY = {"compute": "compute", "memory": "HBM", "links": "links"}  # what a step can be bound by
HEAD = (
    "what",
    "chips, layout",
    "rows a chip",
    "memory at the peak, MiB",
    "foreseen",
    "all-gathers, all-reduces",
    "compute, HBM, links at least, ms",
    "MFU at most",
    "rows a second at most",
    "compiled in, CPU s",
)


def read(folder: str | Path) -> list[dict[str, Any]]:
    """The figures in a folder, by model and then by chips.

    Raises:
      FileNotFoundError: there are none.
      ValueError: a file of JSON that holds something else.
    """
    found = []
    for path in sorted(Path(folder).glob("*.json")):
        try:
            figures = json.loads(path.read_text())
            line(figures)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} holds no figures of `ldm_jax.compile --out`") from error
        found.append(figures)
    if not found:
        raise FileNotFoundError(
            f"there are no figures in {str(folder)!r}; write some: python -m ldm_jax.compile --out {folder}/NAME.json"
        )
    return sorted(found, key=lambda of: (name(of), of["topology"]))


def name(figures: Mapping[str, Any]) -> str:
    """The config, and "sampler" where it is not the train step."""
    words = shlex.split(figures["command"].replace("--config=", "--config "))
    of = Path(words[words.index("--config") + 1]).stem
    return of if figures["what"] == "train" else f"{of}, sampler"


def off(figures: Mapping[str, Any]) -> float:
    """By which share of the memory at the peak what was foreseen differs from it."""
    memory = figures["memory"]
    return sum(memory["foreseen"].values()) / memory["peak"] - 1


def line(figures: Mapping[str, Any]) -> tuple[str, ...]:
    """The cells of a row, in the order of `HEAD`."""
    memory, seconds, sent = figures["memory"], figures["seconds"], figures["collectives"]
    slices = f"{figures['slices']} x " if figures["slices"] > 1 else ""
    mesh = " x ".join(f"{axis} {n}" for axis, n in figures["mesh"].items())
    reduced = sent.get("all-reduce", {"count": 0, "small": 0})
    small = f" ({reduced['small']} small)" if reduced["small"] else ""
    return (
        name(figures),
        f"{slices}{figures['topology']}, {mesh}",
        f"{figures['batch_per_device']:g}",
        f"{memory['peak'] / 2**20:,.0f} of {memory['of'] / 2**20:,.0f}",
        f"{100 * off(figures):+.1f} %",
        f"{sent.get('all-gather', {'count': 0})['count']}, {reduced['count']}{small}",
        ", ".join(f"{1e3 * seconds[of]:.1f}" for of in BY),
        f"{100 * figures['mfu_bound']:.1f} %, by {BY[figures['bound_by']]}",
        f"{figures['rows_per_second_bound']:,.0f}",
        f"{figures['compile_cpu_seconds']:,.0f}{'' if 'code' in memory else ', no code'}",
    )


def shares(records: Iterable[Mapping[str, Any]]) -> list[tuple[str, float]]:
    """How long compute, HBM and links take of each step, in % of the longest of them: bars with names."""
    found = []
    for figures in records:
        seconds, chip = figures["seconds"], figures["topology"].partition(":")[0]
        for key, kind in BY.items():
            share = 100 * seconds[key] / seconds["bound"]
            found.append((f"{kind}, {name(figures)} {chip}", share))
    return found
