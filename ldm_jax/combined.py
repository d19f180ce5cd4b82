"""Several prompts for one picture, as they are written in one line.

    a red square AND a blue cross        both at once: all guided differences are added (Liu et al. 2022)
    a red square BLEND a blue cross      between them: the mean of what the network reads
    a red square AND a blue cross:0.5    with a weight; without one it is 1

A negative weight of AND leads away from a prompt, relative to the model's scale of guidance.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

_BETWEEN = re.compile(r"\s+(AND|BLEND)\s+")
_WEIGHED = re.compile(r"(.*?)\s*:\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*", re.DOTALL)


class Combined(NamedTuple):
    """Captions by their parts: `columns[k][i]` is the k-th part of the i-th caption, "" where it has none."""

    how: str | None  # "AND", "BLEND", or None: each caption is one prompt
    columns: list[list[str]]
    weights: Float[np.ndarray, "n k"]  # 0 where there is no part


def combined(captions: Sequence[str]) -> Combined:
    """The parts of captions.

    Raises:
      ValueError: AND and BLEND together, a part without words, or weights of BLEND that are no shares.
    """
    split = [_BETWEEN.split(caption) for caption in captions]
    kinds = {word for parts in split for word in parts[1::2]}
    if not kinds:
        return Combined(None, [list(captions)], np.ones((len(captions), 1), np.float32))
    if len(kinds) > 1:
        raise ValueError("AND and BLEND cannot be mixed; draw such prompts one after the other")
    (how,) = kinds
    many = max(len(parts[0::2]) for parts in split)
    columns = [[""] * len(captions) for _ in range(many)]
    weights = np.zeros((len(captions), many), np.float32)
    for i, (caption, parts) in enumerate(zip(captions, split, strict=True)):
        for k, part in enumerate(parts[0::2]):
            match = _WEIGHED.fullmatch(part) if len(parts) > 1 else None
            columns[k][i], weights[i, k] = (match[1], match[2]) if match else (part, 1)
            if len(parts) > 1 and not columns[k][i].strip():
                raise ValueError(f"{caption!r} has a part without words beside its {how}")
        if how == "BLEND" and (weights[i].min() < 0 or not weights[i].any()):
            raise ValueError(
                f"the weights of {caption!r} are shares of its parts; give numbers from 0 on"
            )
    return Combined(how, columns, weights)
