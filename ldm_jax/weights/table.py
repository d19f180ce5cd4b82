"""A foreign checkpoint as a table: which of our modules is which of theirs.

A row pairs two names, ours with slashes and theirs with dots; `{x}` stands for one part of a name on both sides:

    Row("down_{i}/res_{j}/conv1", "down_blocks.{i}.resnets.{j}.conv1")

Leaves follow by themselves: `kernel`, `scale` and `embedding` are their `weight`, `bias` is `bias`. A row may also
name a single leaf of ours, and then the whole name of their tensor: Row("position", "embeddings.position"). Their
kernels are [out, in, *space], ours [*space, in, out]; all else lies alike, unless a row's `Layout` says otherwise. Read
from right to left the same table exports. A table may have rows for modules that a network lacks.
"""

import difflib
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax import tree

LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
NAMED = 5  # of the tensors that do not fit, so many are named for each kind of trouble


class Layout(NamedTuple):
    """How a tensor of theirs differs from the leaf that it is."""

    keep: bool = False  # a kernel has its axes in our order
    ones: int = 0  # a kernel has so many more axes, of size 1: a matrix stored as a 1x1 convolution
    part: int = 0  # the leaf is this part ...
    of: int = 1  # ... of so many that lie one after the other along the first axis: q, k and v
    heads: int = 1  # and they do so within each of so many heads


PLAIN = Layout()


class Row(NamedTuple):
    """A module (or a leaf) of ours and the same one of theirs."""

    ours: str
    theirs: str
    layout: Layout = PLAIN


class Place(NamedTuple):
    """Where they keep a leaf of ours."""

    name: str
    layout: Layout


Table = Sequence[Row]


class Mismatch(ValueError):
    """Weights that are not those of the network."""


def under(ours: str, theirs: str, rows: Table) -> tuple[Row, ...]:
    """The rows of a part, where it stands in the whole: "mid/res_{j}" before "conv1"."""
    return tuple(
        row._replace(ours=f"{ours}/{row.ours}", theirs=f"{theirs}.{row.theirs}") for row in rows
    )


@functools.cache
def _pattern(ours: str) -> re.Pattern:
    return re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>[^/]+)", re.escape(ours)))


def find(table: Table, name: str) -> Place | None:
    """Where they keep our leaf, by the first row that matches; None without one."""
    module, _, leaf = name.rpartition("/")
    for row in table:
        if match := _pattern(row.ours).fullmatch(name):
            return Place(row.theirs.format(**match.groupdict()), row.layout)
        if leaf in LEAVES and (match := _pattern(row.ours).fullmatch(module)):
            return Place(f"{row.theirs.format(**match.groupdict())}.{LEAVES[leaf]}", row.layout)
    return None


def their_name(table: Table, name: str) -> str | None:
    """What they call the tensor that holds our leaf."""
    place = find(table, name)
    return place and place.name


def _turns(name: str, layout: Layout) -> bool:
    return name.endswith("/kernel") and not layout.keep


def _ones(name: str, layout: Layout) -> tuple[int, ...]:
    return (1,) * layout.ones if name.endswith("/kernel") else ()


def to_ours(name: str, tensor: np.ndarray, layout: Layout = PLAIN) -> np.ndarray:
    if layout.of > 1:
        parts = tensor.reshape(layout.heads, layout.of, -1, *tensor.shape[1:])
        tensor = parts[:, layout.part].reshape(-1, *tensor.shape[1:])
    tensor = tensor.reshape(tensor.shape[: tensor.ndim - len(_ones(name, layout))])
    return np.moveaxis(tensor, (0, 1), (-1, -2)) if _turns(name, layout) else tensor


def to_theirs(name: str, array: np.ndarray, layout: Layout = PLAIN) -> np.ndarray:
    """Their tensor, or the part of it that the leaf is."""
    tensor = np.moveaxis(array, (-1, -2), (0, 1)) if _turns(name, layout) else array
    return tensor.reshape(*tensor.shape, *_ones(name, layout))


def their_shape(name: str, shape: tuple[int, ...], layout: Layout = PLAIN) -> tuple[int, ...]:
    """Of the whole tensor."""
    if _turns(name, layout):
        shape = (shape[-1], shape[-2], *shape[:-2])
    return (shape[0] * layout.of, *shape[1:], *_ones(name, layout))


def load(table: Table, shapes: Any, tensors: Mapping[str, Any], ignore: Sequence[str] = ()) -> Any:
    """Their tensors as our parameters, in the types of `shapes` and, where these have one, with their shardings.

    `tensors` are arrays, or know their `shape` and become arrays when they are read (see `files`): all of them are
    checked before the first is read, and one is read at a time. Tensors of theirs that have no leaf are an error, but
    for those whose whole name one of the regexes in `ignore` matches; such a regex may be idle.

    Raises:
      Mismatch: a leaf without a row, tensors that are missing, of another shape or not used; all that was found.
    """
    places = check(table, shapes, tensors, ignore)

    def read(name, leaf):
        theirs, layout = places[name]
        # Turned by the device's own copy, which does it faster than numpy, and with no other copy of the tensor.
        array = np.asarray(tensors[theirs]).astype(leaf.dtype, copy=False)
        placed = jax.device_put(to_ours(name, array, layout), leaf.sharding)
        return jax.block_until_ready(placed)  # so that one tensor at a time waits in memory

    return tree.map_named(read, shapes)


def check(
    table: Table, shapes: Any, tensors: Mapping[str, Any], ignore: Sequence[str] = ()
) -> dict[str, Place]:
    """Where each of our leaves is; looks at names and shapes and reads no tensor.

    Raises:
      Mismatch: see `load`.
    """
    named = dict(zip(tree.names(shapes), jax.tree.leaves(shapes), strict=True))
    places = {name: find(table, name) for name in named}
    wanted = {
        place.name: their_shape(name, named[name].shape, place.layout)
        for name, place in places.items()
        if place
    }
    unused = sorted(
        name
        for name in tensors.keys() - wanted.keys()
        if not any(re.fullmatch(pattern, name) for pattern in ignore)
    )

    def nearest(name):
        near = difflib.get_close_matches(name, unused, 1)
        return f"{name!r} (nearest: {near[0]!r})" if near else repr(name)

    given = {name: tensors[name] for name in wanted if name in tensors}
    pairs = [(name, tuple(tensor.shape), wanted[name]) for name, tensor in given.items()]
    # None is a type that numpy lacks.
    types = [(name, getattr(tensor, "dtype", np.float32)) for name, tensor in given.items()]
    found = {
        "of our leaves have no row in the table": [
            repr(n) for n, place in places.items() if not place
        ],
        "tensors are missing": [nearest(t) for t in sorted(wanted.keys() - tensors.keys())],
        "tensors have another shape": [
            f"{t!r} {has} instead of {wants}" for t, has, wants in pairs if has != wants
        ],
        "tensors are no floating-point numbers": [
            f"{t!r} {kind or 'of an unknown type'}"
            for t, kind in types
            if kind is None or not jnp.issubdtype(kind, jnp.floating)
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
    return places


def export(table: Table, params: Any) -> dict[str, np.ndarray]:
    """Our parameters under their names, with their axes; the inverse of `load`.

    Raises:
      Mismatch: a leaf without a row.
    """
    parts: dict[str, dict[int, np.ndarray]] = {}
    heads = {}
    for name, leaf in zip(tree.names(params), jax.tree.leaves(params), strict=True):
        place = find(table, name)
        if place is None:
            raise Mismatch(f"the table has no row for our leaf {name!r}; add one")
        part = to_theirs(name, np.asarray(leaf), place.layout)
        parts.setdefault(place.name, {})[place.layout.part] = part
        heads[place.name] = place.layout.heads
    return {name: _joined(found, heads[name]) for name, found in parts.items()}


def _joined(parts: dict[int, np.ndarray], heads: int) -> np.ndarray:
    """The parts one after the other along the first axis, within each head."""
    if len(parts) == 1:
        return np.ascontiguousarray(parts[0])
    split = [parts[i].reshape(heads, -1, *parts[i].shape[1:]) for i in range(len(parts))]
    return np.concatenate(split, axis=1).reshape(-1, *parts[0].shape[1:])
