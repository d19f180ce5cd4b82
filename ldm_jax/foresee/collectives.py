"""What the chips of a compiled program tell each other, counted in its text.

    %all-reduce.7 = (f32[3,3,192,192]{...}, f32[192]{...}) all-reduce(...), replica_groups=...

is one all-reduce of both arrays. Where an operation is cut into a start and a done, the start counts; where a fusion is
named all-reduce-scatter, what it does is a reduce-scatter. An operation within a loop counts once.
"""

import math
import re
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# How often the bytes of a result leave a chip, in a ring of many: an all-reduce gathers after it has scattered.
TRIPS = {"all-reduce": 2.0}
_OPERATION = re.compile(
    rf"^\s*(?:ROOT )?%?\S+ = (.*?) ({'|'.join(KINDS)})(-start)?\((.*)$", re.MULTILINE
)
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(\S+) \(.*\{$", re.MULTILINE)
# The size of a group of chips, as XLA writes it: [groups,size], {{one,group},...}, or axes of a mesh by their names.
_GROUPS = re.compile(r"replica_groups=(?:\[\d+,(\d+)\]|\{\{([\d,]+)\}|mesh\[(.*?)\].*?\{(.*?)\})")
_AXIS = re.compile(r"'(\w+)'=(\d+)")
_ARRAY = re.compile(r"\b(pred|[a-z]+[0-9]+\w*)\[([0-9,]*)\]")


class Collective(NamedTuple):
    kind: str
    size: int  # bytes on one chip: of the result, or of what a reduce-scatter is given


def read(text: str) -> list[Collective]:
    """The collective operations of a compiled program, largest first."""
    starts = [(m.start(), m[1]) for m in _COMPUTATION.finditer(text)]
    found = []
    for match in _OPERATION.finditer(text):
        shape, kind, begun, rest = match.groups()
        sizes = [_bytes(*array) for array in _ARRAY.findall(shape)]
        if begun and kind in ("all-gather", "collective-permute"):
            sizes = (
                sizes[len(sizes) // 2 :] if kind == "all-gather" else sizes[1:2]
            )  # not what went in
        within = next((name for at, name in reversed(starts) if at < match.start()), "")
        size = sum(sizes) * (_group(rest) if kind == "reduce-scatter" else 1)
        if kind == "all-reduce" and "all-reduce-scatter" in within:
            kind = "reduce-scatter"
        found.append(Collective(kind, size))
    return sorted(found, key=lambda c: -c.size)


def _group(rest: str) -> int:
    """How many chips share an operation."""
    groups = _GROUPS.search(rest)
    if groups is None:
        return 1
    if groups[1]:
        return int(groups[1])
    if groups[2]:
        return groups[2].count(",") + 1
    sizes = dict(_AXIS.findall(groups[3]))
    return math.prod(int(sizes[name.strip().strip("'")]) for name in groups[4].split(","))


def _bytes(dtype: str, shape: str) -> int:
    bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])
    return math.prod(int(n) for n in shape.split(",") if n) * bits // 8


def moved(found: list[Collective]) -> float:
    """Bytes that leave a chip for all of them."""
    return sum(TRIPS.get(c.kind, 1.0) * c.size for c in found)


def summary(found: list[Collective]) -> dict[str, dict[str, int]]:
    """By kind: how many, and their bytes."""
    return {
        kind: {"count": len(sizes), "bytes": sum(sizes)}
        for kind in KINDS
        if (sizes := [c.size for c in found if c.kind == kind])
    }
