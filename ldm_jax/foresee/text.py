"""A compiled program as text, read: its instructions, how often each runs, and what they move to and from HBM.

    ENTRY %main (p: f32[8]) -> f32[8] {
      %fusion.1 = bf16[8,64]{1,0:T(8,128)(2,1)S(1)} fusion(%p.1, %copy-done.2), kind=kOutput, calls=%fused.1

An array whose layout names a memory, such as S(1), lies in the chip's own (VMEM) and not in HBM. An instruction reads
all of its operands once and writes its result once. That is what a fusion does, and less than a convolution may do
whose operands do not fit into VMEM.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(ENTRY )?%?([^\s(]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?(\S+) = (.*?) ([a-z][\w-]*)\((.*)$")
_OPERAND = re.compile(r"%([\w.-]+)")
_CALLED = re.compile(r"(?:body|to_apply|calls|branch_computations)=\{?(%[\w.-]+(?:, ?%[\w.-]+)*)")
# An operation that fusions in a row have in common, each of which does a part of it beside its own work.
_CHAIN = re.compile(r'chain_id="(\d+)"')
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_ARRAY = re.compile(r"\b(pred|[a-z]+[0-9]+\w*)\[([0-9,]*)\](\{[^}]*\})?")
_ELSEWHERE = re.compile(r"S\([1-9]\d*\)")
# What moves nothing, or is counted where it begins.
_STILL = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
}
_SAME_PLACE = 'custom_call_target="ConcatBitcast"'  # arrays that lie side by side already
_ENTERED = ("while", "call", "conditional")  # whose own operands are those of what they run
_FUSED = ("fusion", "async-start")


class Instruction(NamedTuple):
    name: str
    shape: str
    kind: str
    rest: str  # operands and attributes

    @property
    def chain(self) -> tuple[str, str] | None:
        """What the operation is called in all fusions that it goes on in; None for one that is done at once."""
        found = _CHAIN.search(self.rest)
        return (self.kind, found[1]) if found else None

    @property
    def operands(self) -> list[str]:
        depth = 1
        for i, letter in enumerate(self.rest):
            depth += (letter == "(") - (letter == ")")
            if not depth:
                return _OPERAND.findall(self.rest[:i])
        return _OPERAND.findall(self.rest)


def computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The instructions of each computation, and which is the entry."""
    found: dict[str, list[Instruction]] = {}
    entry = within = ""
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            within = header[2]
            found[within] = []
            entry = within if header[1] else entry
        elif within and (match := _INSTRUCTION.match(line)):
            found[within].append(Instruction(*match.groups()))
        elif (
            line.rstrip() == "}"
        ):  # an attribute may go over several lines, and such a line begin so
            within = ""
    named = {name: [_named(one, found) for one in ones] for name, ones in found.items()}
    return named, entry


def _named(one: Instruction, found: dict[str, list[Instruction]]) -> Instruction:
    """An operation of a computation of its own, begun by an async-start, as jax writes it: a slice-start, say."""
    called = _CALLED.search(one.rest) if one.kind == "async-start" else None
    inside = found.get(called[1].removeprefix("%")) if called else None
    # A fusion remains one: what it holds is looked for within.
    if not inside or (kind := inside[-1].kind) == "fusion":
        return one
    return one._replace(kind=f"{kind}-start")


def running(text: str, fused: bool = False) -> Iterator[tuple[Instruction, int, str]]:
    """Every instruction that runs, how often, and in which computation; with `fused` those within fusions too."""
    found, entry = computations(text)
    entered = (*_ENTERED, *_FUSED) if fused else _ENTERED

    def walk(name, times):
        for one in found.get(name, ()):
            yield one, times, name
            if one.kind in entered:
                turns = _TURNS.search(one.rest) if one.kind == "while" else None
                for names in _CALLED.findall(one.rest):
                    for called in _OPERAND.findall(names):
                        yield from walk(called, times * (int(turns[1]) if turns else 1))

    if entry:
        yield from walk(entry, 1)


def arrays(shape: str, hbm: bool = False) -> list[int]:
    """Bytes of the arrays of a shape, or of those among them that lie in HBM."""
    found = []
    for dtype, sizes, layout in _ARRAY.findall(shape):
        bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])
        if not (hbm and _ELSEWHERE.search(layout)):
            found.append(math.prod(int(n) for n in sizes.split(",") if n) * bits // 8)
    return found


def traffic(text: str) -> int:
    """Bytes to and from HBM."""
    total, found, begun = 0, computations(text)[0], set()
    shapes = {name: {one.name: one.shape for one in ones} for name, ones in found.items()}
    for one, times, within in running(text):
        if (
            one.kind in (*_STILL, *_ENTERED)
            or one.kind.endswith("-done")
            or _SAME_PLACE in one.rest
        ):
            continue
        if one.kind == "slice-start":  # its result names the whole, and then what is moved of it
            size, *_ = arrays(one.shape)[1:]
            whole, part = [not _ELSEWHERE.search(at) for _, _, at in _ARRAY.findall(one.shape)][:2]
            total += times * size * (whole + part)
            continue
        if one.kind.endswith("-start"):  # its result names both what is read and what is written
            total += times * sum(arrays(one.shape, hbm=True))
            continue
        if one.kind == "fusion" and (called := _CALLED.search(one.rest)):
            # What goes on in it is handed on and not moved again.
            for inner in found.get(called[1].removeprefix("%"), ()):
                if inner.chain in begun:
                    total -= times * 2 * sum(arrays(inner.shape, hbm=True))
                begun |= {inner.chain} - {None}
        read = sum(sum(arrays(shapes[within].get(name, ""), hbm=True)) for name in one.operands)
        total += times * (read + sum(arrays(one.shape, hbm=True)))
    return total
