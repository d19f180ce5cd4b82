"""Boxes of named things that a user asks for, as the row of tokens that a layout model reads.

    [{"class": "red cross", "box": [0.1, 0.2, 0.6, 0.7]}, {"class": "blue square", "box": [0.5, 0.5, 1, 1]}]

A box is ymin, xmin, ymax, xmax, as parts of the picture's sides from 0 to 1. The class is named as the training's data
name it; of several entries of `data.layout.classes` with names their names follow each other ("red cross"). An entry
without names is given by itself, as a number (`"group": 1`), and is 0 where it is left out beside a class.
"""

import difflib
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from ldm_jax.build.sections import did_you_mean
from ldm_jax.data import layout
from ldm_jax.data.layout import Layout
from ldm_jax.data.transforms import Window

Kinds = Mapping[str, Sequence[str]]  # the names of an entry's values
Asked = Sequence[Mapping[str, Any]]
WHOLE = Window((1, 1), (0, 0, 1, 1), flip=False)
SHOWN = 40  # choices in a message; of more the nearest ones


def read(path: str | Path) -> list[dict[str, Any]]:
    """The boxes in a JSON file.

    Raises:
      FileNotFoundError: there is none.
      ValueError: a file of something else.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file of boxes {str(path)!r}")
    try:
        found = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"the file of boxes {str(path)!r} is no JSON ({error})") from error
    if not (isinstance(found, list) and all(isinstance(box, dict) for box in found)):
        raise ValueError(
            f'the file {str(path)!r} must be a list of boxes, such as [{{"class": "cat", "box": [0, 0, 0.5, 1]}}]'
        )
    return found


def tokens(of: Layout, kinds: Kinds, asked: Asked) -> Int[np.ndarray, " n"]:
    """The row of a picture that is seen as a whole.

    Raises:
      ValueError: no box or too many, a class that there is not ("did you mean"), or a box outside of the picture.
    """
    if not 1 <= len(asked) <= of.objects:
        raise ValueError(f"{len(asked)} boxes were given, and this model reads 1 to {of.objects}")
    named = [name for name, _ in of.classes if kinds.get(name)]
    bare = [name for name, _ in of.classes if name not in named]
    pairs = itertools.product(*(enumerate(kinds[name]) for name in named))
    known = {" ".join(name for _, name in pair): [i for i, _ in pair] for pair in pairs}
    keys, columns = ["class"] * bool(named) + bare + ["box"], {name: [] for name, _ in of.classes}
    needed = ["class", "box"] if named else keys
    for box in asked:
        if wrong := [key for key in box if key not in keys]:
            raise ValueError(f"a box has the entry {wrong[0]!r}{did_you_mean(wrong[0], keys)}")
        if missing := [key for key in needed if key not in box]:
            raise ValueError(f"the box {dict(box)} lacks {missing[0]!r}; it needs {needed}")
        if named:
            numbers = _class(known, box["class"])
            for name, number in zip(named, numbers, strict=True):
                columns[name].append(number)
        for name in bare:
            columns[name].append(_number(name, box.get(name, 0)))
    boxes = columns | {layout.BOX: np.stack([_sides(box["box"]) for box in asked])}
    return layout.tokens(of, boxes, WHOLE, np.random.default_rng(0))


def _class(known: Mapping[str, list[int]], name: Any) -> list[int]:
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=8, cutoff=0.3) or list(known)[:8]
        choices = near if len(known) > SHOWN else known
        raise ValueError(f"there is no class {name!r}{did_you_mean(str(name), choices)}")
    return known[name]


def _number(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"the entry {name!r} of a box is {value!r}, and must be a whole number")
    return value


def _sides(box: Any) -> np.ndarray:
    numbers = isinstance(box, list | tuple) and all(
        isinstance(side, int | float) and not isinstance(side, bool) for side in box
    )
    if not numbers or len(box) != 4:
        raise ValueError(
            f"the box {box!r} must be four numbers: ymin, xmin, ymax, xmax as parts of the sides"
        )
    return np.asarray(box, np.float64)
