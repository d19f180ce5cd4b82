"""What the chips of a compiled program tell each other, counted in its text.

    %all-reduce.7 = (f32[3,3,192,192]{...}, f32[192]{...}) all-reduce(...), replica_groups=...

is one all-reduce of both arrays. Where an operation is cut into a start and a done, the start counts; where a fusion is
named all-reduce-scatter, what it does is a reduce-scatter; within a loop it counts in each turn, and once where it goes
on in several fusions (chain_id).
"""

import math
import re
from typing import NamedTuple

from ldm_jax.foresee import text as program_text

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# Bytes: no gradient of a network, and less than a chip sends in the time that it takes to begin.
SMALL = 2**12
# How often the bytes of a result leave a chip, in a ring of many: an all-reduce gathers after it has scattered.
TRIPS = {"all-reduce": 2.0}
# The size of a group of chips, as XLA writes it: [groups,size], {{one,group},...}, or axes of a mesh by their names.
_GROUPS = re.compile(r"replica_groups=(?:\[\d+,(\d+)\]|\{\{([\d,]+)\}|mesh\[(.*?)\].*?\{(.*?)\})")
_AXIS = re.compile(r"'(\w+)'=(\d+)")


class Collective(NamedTuple):
    kind: str
    size: int  # bytes on one chip: of the result, or of what a reduce-scatter is given


def read(text: str) -> list[Collective]:
    """The collective operations of a compiled program, largest first."""
    found, begun = [], set()
    for one, times, within in program_text.running(text, fused=True):
        kind = one.kind.removesuffix("-start")
        if kind not in KINDS:
            continue
        if one.chain in begun:
            continue
        begun |= {one.chain} - {None}
        sizes = program_text.arrays(one.shape)
        if one.kind.endswith("-start") and kind in ("all-gather", "collective-permute"):
            # Not what went in.
            sizes = sizes[len(sizes) // 2 :] if kind == "all-gather" else sizes[1:2]
        size = sum(sizes) * (_group(one.rest) if kind == "reduce-scatter" else 1)
        if kind == "all-reduce" and "all-reduce-scatter" in within:
            kind = "reduce-scatter"
        found += [Collective(kind, size)] * times
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


def moved(found: list[Collective]) -> float:
    """Bytes that leave a chip for all of them."""
    return sum(TRIPS.get(c.kind, 1.0) * c.size for c in found)


def summary(found: list[Collective]) -> dict[str, dict[str, int]]:
    """By kind: how many, how many of these are small (`SMALL`: losses and norms), and the bytes of all."""
    return {
        kind: {
            "count": len(sizes),
            "small": sum(size < SMALL for size in sizes),
            "bytes": sum(sizes),
        }
        for kind in KINDS
        if (sizes := [c.size for c in found if c.kind == kind])
    }
