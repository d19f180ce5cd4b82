"""The largest batch on a device that fits, and what lets the most fit: foreseen for all, compiled for what is near."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

MOST = 2**16  # rows on a device
NEAR = 1 / 16  # of the batch: as exactly as that is worth a compile
COMPILES = 5


class Choice(NamedTuple):
    """One way to lay a program out, with what is foreseen of n rows on a device."""

    name: str
    inputs: Callable[[int], float]  # bytes on a device
    temporary: Callable[[int], float]
    seconds: Callable[[int], float]  # of a step, at least

    def bytes(self, rows: int, scale: float = 1.0) -> float:
        return self.inputs(rows) + scale * self.temporary(rows)

    def most(self, memory: float, scale: float = 1.0) -> int:
        """The most rows that fit into so many bytes, 0 if none, where what is temporary is `scale` times as large."""
        low, high = 0, 1
        while high <= MOST and self.bytes(high, scale) <= memory:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.bytes(middle, scale) <= memory else (low, middle)
        return low


def ranked(choices: Sequence[Choice], memory: float) -> list[tuple[Choice, int]]:
    """Those of which at least a row fits, with the most that fit; the most rows a second first, then the most rows.

    Choices that are as good keep their order.
    """
    found = [(choice, rows) for choice in choices if (rows := choice.most(memory))]
    return sorted(
        found, key=lambda of: (round(of[1] / of[0].seconds(of[1]), 1), of[1]), reverse=True
    )


def settled(choice: Choice, memory: float, needs: Callable[[int], tuple[bool, float]]) -> int:
    """The most rows that fit indeed, or as good as that; 0 if not one does.

    `needs(n)` compiles: whether n rows fit, and the bytes that they need. Each answer corrects what is foreseen, which
    says what to ask next; it ends between two neighbours, or nearly so (`NEAR`), after `COMPILES` at most.
    """
    low, high = 0, None
    rows = max(choice.most(memory), 1)
    for _ in range(COMPILES):
        fits, needed = needs(rows)
        low, high = (rows, high) if fits else (low, rows)
        scale = max(needed - choice.inputs(rows), 1.0) / max(choice.temporary(rows), 1.0)
        rows = choice.most(memory, scale)
        if high is None:
            if rows <= low * (1 + NEAR):
                break
        else:
            if high - low <= max(1, NEAR * low):
                break
            rows = min(max(rows, low + 1), high - 1)
    return low
