"""A foreign checkpoint as a table: which of our modules is which of theirs.

A row pairs two names, ours with slashes and theirs with dots; `{x}` stands for one part of a name on both sides:

    Row("down_{i}/res_{j}/conv1", "down_blocks.{i}.resnets.{j}.conv1")

Leaves follow by themselves: `kernel`, `scale` and `embedding` are their `weight`, `bias` is `bias`. Their kernels are
[out, in, *space], ours [*space, in, out]; all else lies alike. Read from right to left the same table exports. A table
may have rows for modules that a network lacks.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ldm_jax import tree

LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
NAMED = 5  # of the tensors that do not fit, so many are named for each kind of trouble


class Row(NamedTuple):
    """A module of ours and the same module of theirs."""

    ours: str
    theirs: str


Table = Sequence[Row]


class Mismatch(ValueError):
    """Weights that are not those of the network."""


def under(ours: str, theirs: str, rows: Table) -> tuple[Row, ...]:
    """The rows of a part, where it stands in the whole: "mid/res_{j}" before "conv1"."""
    return tuple(Row(f"{ours}/{row.ours}", f"{theirs}.{row.theirs}") for row in rows)


def their_name(table: Table, name: str) -> str | None:
    """What they call our leaf, by the first row that matches; None without one."""
    module, _, leaf = name.rpartition("/")
    if leaf not in LEAVES:
        return None
    for row in table:
        pattern = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>[^/]+)", re.escape(row.ours))
        if match := re.fullmatch(pattern, module):
            return f"{row.theirs.format(**match.groupdict())}.{LEAVES[leaf]}"
    return None


def to_ours(name: str, tensor: np.ndarray) -> np.ndarray:
    return np.moveaxis(tensor, (0, 1), (-1, -2)) if name.endswith("/kernel") else tensor


def to_theirs(name: str, array: np.ndarray) -> np.ndarray:
    return np.moveaxis(array, (-1, -2), (0, 1)) if name.endswith("/kernel") else array


def their_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[-1], shape[-2], *shape[:-2]) if name.endswith("/kernel") else shape


def load(table: Table, shapes: Any, tensors: Mapping[str, Any]) -> Any:
    """Their tensors as our parameters, in the types of `shapes` and, where these have one, with their shardings.

    `tensors` are arrays, or know their `shape` and become arrays when they are read (see `files`): all of them are
    checked before the first is read, and one is read at a time.

    Raises:
      Mismatch: a leaf without a row, tensors that are missing, of another shape or not used; all that was found.
    """
    named = dict(zip(tree.names(shapes), jax.tree.leaves(shapes), strict=True))
    theirs = {name: their_name(table, name) for name in named}
    _check(named, theirs, tensors)

    def read(name, leaf):
        array = to_ours(name, np.asarray(tensors[theirs[name]])).astype(leaf.dtype)
        return jax.device_put(array, leaf.sharding)

    return tree.map_named(read, shapes)


def _check(named: dict[str, Any], theirs: dict[str, str | None], tensors: Mapping[str, Any]):
    """Raises Mismatch unless every leaf has its tensor and every tensor its leaf."""
    wanted = {t: their_shape(name, named[name].shape) for name, t in theirs.items() if t}
    unused = sorted(tensors.keys() - wanted.keys())

    def nearest(name):
        near = difflib.get_close_matches(name, unused, 1)
        return f"{name!r} (nearest: {near[0]!r})" if near else repr(name)

    shapes = [(t, tuple(tensors[t].shape), shape) for t, shape in wanted.items() if t in tensors]
    found = {
        "of our leaves have no row in the table": [repr(n) for n, t in theirs.items() if not t],
        "tensors are missing": [nearest(t) for t in sorted(wanted.keys() - tensors.keys())],
        "tensors have another shape": [
            f"{t!r} {has} instead of {wants}" for t, has, wants in shapes if has != wants
        ],
        "tensors are not used": [repr(t) for t in unused],
    }
    troubles = [
        f"{len(items)} {what}: {', '.join(items[:NAMED])}{', ...' if len(items) > NAMED else ''}"
        for what, items in found.items()
        if items
    ]
    if troubles:
        raise Mismatch(
            f"the weights are not those of this network; {'; '.join(troubles)}. Load them into the network that their "
            "own config describes"
        )


def export(table: Table, params: Any) -> dict[str, np.ndarray]:
    """Our parameters under their names, with their axes; the inverse of `load`.

    Raises:
      Mismatch: a leaf without a row.
    """
    tensors = {}
    for name, leaf in zip(tree.names(params), jax.tree.leaves(params), strict=True):
        theirs = their_name(table, name)
        if theirs is None:
            raise Mismatch(f"the table has no row for our leaf {name!r}; add one")
        tensors[theirs] = np.ascontiguousarray(to_theirs(name, np.asarray(leaf)))
    return tensors
