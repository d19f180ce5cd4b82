"""How much memory of a chip a program will take, foreseen from its trace: in seconds, where compiling takes minutes.

The trace of one device's part of the batch is walked in its order, as XLA's schedule for little memory nearly does,
and what is alive is added up. What XLA is assumed to do:

    products, convolutions, kernels, sums, gathers     write their results
    all else (elementwise, broadcasts, reshapes)       is fused into what reads it: such a value is kept as what it is
                                                       made of, or as itself where that is less
    donated inputs                                     hold what takes their place
    arrays of a shape that is split (ZeRO, FSDP)       are split too, and are gathered for the one operation that reads
                                                       them whole

Sizes are those in tiles of 8 x 128, along the two axes for which that adds least. Two traces, of batches of different
sizes, tell how each value grows with the batch, and so the memory of any.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

LANES, SUBLANES = 128, 8
SMALL = 2**12  # bytes that are kept as they are
# What writes its result; a name may be the beginning of one.
WRITES = (
    "conv_general_dilated",
    "dot_general",
    "pallas_call",
    "reduce",
    "arg",
    "cum",
    "concatenate",
    "gather",
    "scatter",
    "dynamic_update_slice",
    "sort",
    "threefry2x32",
    "random_bits",
    "scan",
    "while",
    "cond",
)
LOOPS = ("scan", "while", "cond")  # which hold programs of their own
PRODUCTS = ("conv_general_dilated", "dot_general", "pallas_call")


class Value(NamedTuple):
    """An array: its bytes are `fixed + each * n` for n rows of the batch."""

    fixed: float
    each: float
    shape: tuple[int, ...]

    def at(self, rows: int) -> float:
        return self.fixed + self.each * rows


class Operation(NamedTuple):
    """What reads the values of these numbers and makes those; `within` is what goes on inside of a loop."""

    name: str
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    within: tuple["Trace", ...] = ()

    @property
    def writes(self) -> bool:
        return self.name.startswith(WRITES)


class Trace(NamedTuple):
    """A program's values and operations, without calls."""

    values: Mapping[int, Value]
    operations: Sequence[Operation]
    returned: tuple[int, ...]


def in_tiles(shape: Sequence[int], size: int) -> int:
    """Bytes of an array on a TPU, whose last two axes in memory are filled up to tiles of 8 x 128."""
    if len(shape) < 2:
        return math.prod(shape) * size

    def filled(n, unit):
        return -(-n // unit) * unit

    def ratio(i, j):
        return filled(shape[i], LANES) / shape[i] * (filled(shape[j], SUBLANES) / shape[j])

    if not math.prod(shape):
        return 0
    axes = range(len(shape))
    return round(math.prod(shape) * size * min(ratio(i, j) for i in axes for j in axes if i != j))


def of_inputs(inputs: Any) -> int:
    """Bytes of arrays on one device, in tiles, by shapes and layouts."""

    def one(leaf):
        shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
        return _bytes(jax.ShapeDtypeStruct(shape, leaf.dtype))

    return sum(map(one, jax.tree.leaves(inputs)))


def shares(leaves: Iterable[Any]) -> dict[tuple[int, ...], float]:
    """For the shapes of arrays that lie split: how much of them a device has."""
    found = {}
    for leaf in leaves:
        part = math.prod(leaf.sharding.shard_shape(leaf.shape)) / max(math.prod(leaf.shape), 1)
        if part < 1:
            found[leaf.shape] = min(part, found.get(leaf.shape, 1.0))
    return found


def _bytes(aval: Any) -> int:
    if not hasattr(aval, "shape"):
        return 0
    if jax.dtypes.issubdtype(aval.dtype, jax.dtypes.prng_key):
        return math.prod(aval.shape) * 8
    return in_tiles(aval.shape, aval.dtype.itemsize)


def trace(
    make: Callable[[int], tuple[Callable[..., Any], Sequence[Any]]],
    mesh: Mesh,
    sizes: tuple[int, int],
) -> Trace:
    """The trace of a program on the one device of `mesh`.

    `make(n)` gives the function, and the shapes of its inputs for n rows of the batch.
    """

    def jaxpr(n):
        call, inputs = make(n)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return jax.make_jaxpr(lambda *args: call(*args))(*inputs).jaxpr

    small, large = (jaxpr(n) for n in sizes)
    return _traced(small, large, sizes)


def _traced(small: Any, large: Any, sizes: tuple[int, int]) -> Trace:
    values, operations = {}, []

    def number(a, b):
        at, to = _bytes(a.aval), _bytes(b.aval)
        each = (to - at) / (sizes[1] - sizes[0])
        shape = tuple(getattr(a.aval, "shape", ()))
        values[len(values)] = Value(at - each * sizes[0], each, shape)
        return len(values) - 1

    def inputs(eqn, env):
        return tuple(env[v] for v in eqn.invars if not hasattr(v, "val"))

    def walk(small, large, env):
        for a, b in zip(small.eqns, large.eqns, strict=True):
            name, inner = a.primitive.name, list(zip(_inner(a), _inner(b), strict=True))
            if inner and not name.startswith((*LOOPS, "pallas_call", "custom_root", "reduce")):
                (one, other), *_ = inner
                own = {}
                for v, w in zip(one.constvars, other.constvars, strict=True):
                    own[v] = number(v, w)
                for v, given in zip(
                    one.invars, a.invars[len(a.invars) - len(one.invars) :], strict=True
                ):
                    own[v] = env[given] if not hasattr(given, "val") else number(v, v)
                walk(one, other, own)
                for v, out, w in zip(a.outvars, one.outvars, b.outvars, strict=True):
                    env[v] = own[out] if not hasattr(out, "val") else number(v, w)
                continue
            within = ()
            if name.startswith(LOOPS):
                within = tuple(_traced(*pair, sizes) for pair in inner)
            reads = inputs(a, env)
            makes = tuple(number(v, w) for v, w in zip(a.outvars, b.outvars, strict=True))
            env |= zip(a.outvars, makes, strict=True)
            operations.append(Operation(name, reads, makes, within))

    pairs = zip((*small.constvars, *small.invars), (*large.constvars, *large.invars), strict=True)
    env = {v: number(v, w) for v, w in pairs}
    walk(small, large, env)
    returned = tuple(env[v] for v in small.outvars if not hasattr(v, "val"))
    return Trace(values, operations, returned)


def _inner(eqn: Any) -> list[Any]:
    held = jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns"))
    return [j for value in held if hasattr(j := getattr(value, "jaxpr", value), "eqns")]


def temporary(of: Trace, rows: int, shares: Mapping[tuple[int, ...], float]) -> float:
    """Bytes that the program holds at its peak beside its inputs, for so many rows on a device.

    `shares` says, for the shapes of arrays that lie split, how much of them a device has.
    """
    uses: dict[int, int] = {}
    for operation in of.operations:
        for value in set(operation.reads):
            uses[value] = uses.get(value, 0) + 1
    for value in of.returned:
        uses[value] = uses.get(value, 0) + 1
    # Inputs, and constants.
    given = of.values.keys() - {value for one in of.operations for value in one.makes}
    # What each value is kept as: itself, or (fused) what it is made of. A written value is alive while it or what is
    # kept as it will be read.
    kept: dict[int, frozenset[int]] = {value: frozenset((value,)) for value in given}
    holders: dict[int, int] = {}  # how many values that will be read are kept as this one
    alive = peak = 0.0

    def share(value):
        of_value = of.values[value]
        # What grows with the batch is no parameter, whatever its shape.
        return 1.0 if of_value.each else shares.get(of_value.shape, 1.0)

    def size(value):
        return 0.0 if value in given else share(value) * of.values[value].at(rows)

    def hold(value, made_of):
        nonlocal alive
        kept[value] = made_of
        for root in made_of:
            if not holders.get(root):
                holders[root] = 0
                alive += size(root)
            holders[root] += 1

    def release(value):
        nonlocal alive
        for root in kept[value]:
            if root in holders:
                holders[root] -= 1
                if not holders[root]:
                    alive -= size(root)

    def whole(value):
        """Bytes of what is not here of an array that lies split."""
        split = any(share(root) < 1 for root in kept[value])
        here = share(value) if share(value) < 1 else 0.0
        return of.values[value].at(rows) * (1 - here) if split else 0.0

    for operation in of.operations:
        reads = set(operation.reads)
        last = [value for value in reads if uses[value] == 1]
        wanted = [value for value in operation.makes if uses.get(value)]
        if operation.writes:
            for value in wanted:
                hold(value, frozenset((value,)))
            # What lies split is gathered for a product, and is whole before it is scattered after it.
            product = operation.name.startswith(PRODUCTS)
            gathered = sum(map(whole, (*reads, *wanted))) if product else 0.0
            inside = max((temporary(part, rows, shares) for part in operation.within), default=0.0)
            peak = max(peak, alive + gathered + inside)
        else:
            roots = frozenset().union(*(kept[value] for value in reads))
            dying = sum(
                size(root)
                for root in roots
                if holders.get(root, 0) == sum(root in kept[value] for value in last)
            )
            for value in wanted:
                own = size(value)
                hold(value, frozenset((value,)) if own < max(dying, SMALL) else roots)
        for value in reads:
            uses[value] -= 1
        for value in last:
            release(value)
        peak = max(peak, alive)
    return peak
