"""Where arrays live: one mesh with the axes data, fsdp, space and tensor, and regex rules on parameter names.

A rule's value is a layout:

    "replicate"   on every device
    "fsdp"        over the axis fsdp: along the largest axis that divides, if the array is large enough (ZeRO-3)
    "zero1"       the parameter on every device, its average and its part of the optimizer as by "fsdp" (ZeRO-1)
    a tuple       one mesh axis or None for each axis of the array, such as (None, "tensor")

(Rajbhandari et al. 2020 for ZeRO; Shoeybi et al. 2019 for what `tensor` is for.) The rows of a batch are split over
data and fsdp together, and the longest spatial axis of its data over space: the compiler adds what neighbours exchange,
here and in all that follows from the data.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ldm_jax import tree

AXES = ("data", "fsdp", "space", "tensor")
ROWS = ("data", "fsdp")  # what the rows of a batch are split over
FSDP_MIN_SIZE = 2**14  # smaller arrays are cheaper to copy than to gather

Layout = str | Sequence[str | None]


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    space: int = 1,
    dcn: Mapping[str, int] | None = None,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh over all devices; one axis may be -1 and takes what is left.

    Devices that are neighbours along `tensor` lie closest together, then those along `space`, then `fsdp`: in one host
    where they fit. Where several slices are joined by a slower network, `dcn` says how many of an axis' ways lie
    between slices, such as {"data": 2}; without it the first axis that can takes them.

    Raises:
      ValueError: the axes do not multiply to the number of devices, or `dcn` not to the number of slices.
    """
    devices = sorted(jax.devices() if devices is None else devices, key=_where)
    sizes = dict(data=data, fsdp=fsdp, space=space, tensor=tensor)
    if list(sizes.values()).count(-1) > 1:
        raise ValueError(f"mesh {sizes} has more than one -1; fix all but one")
    known = math.prod(s for s in sizes.values() if s != -1)
    shape = {k: len(devices) // max(known, 1) if s == -1 else s for k, s in sizes.items()}
    if min(shape.values()) < 1 or math.prod(shape.values()) != len(devices):
        said = ", ".join(f"{k}={s}" for k, s in sizes.items())
        raise ValueError(
            f"mesh {said} does not fit the {len(devices)} devices; their product must be the number of devices "
            "(one may be -1)"
        )
    between = _between_slices(shape, dict(dcn or {}), devices)
    within = [shape[axis] // between[axis] for axis in AXES]
    grid = np.asarray(devices).reshape(*between.values(), *within)
    pairs = [i for axis in range(len(AXES)) for i in (axis, len(AXES) + axis)]
    return Mesh(grid.transpose(pairs).reshape([shape[axis] for axis in AXES]), AXES)


def _where(device: Any) -> tuple[int, int, int]:
    return (_slice(device) or 0, device.process_index, device.id)


def _slice(device: Any) -> int | None:
    """The slice that a TPU is in; other devices are in none that is known."""
    return getattr(device, "slice_index", None)


def _between_slices(
    shape: Mapping[str, int], dcn: Mapping[str, int], devices: Sequence[Any]
) -> dict[str, int]:
    for axis, ways in dcn.items():
        if axis not in AXES:
            raise ValueError(f"mesh.dcn names the mesh axis {axis!r}; choose among {AXES}")
        if ways < 1 or shape[axis] % ways:
            raise ValueError(
                f"mesh.dcn.{axis} = {ways} does not divide the axis {axis} of {shape[axis]} devices"
            )
    slices = {_slice(device) for device in devices} - {None}
    if dcn and slices and math.prod(dcn.values()) != len(slices):
        raise ValueError(
            f"mesh.dcn = {dict(dcn)} does not fit the {len(slices)} slice(s) of the devices; "
            "its product must be their number"
        )
    return dict.fromkeys(AXES, 1) | dict(dcn)


def rows(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def check_batch(batch: int, mesh: Mesh, accumulate: int = 1) -> None:
    """Raises ValueError unless every micro-batch divides evenly over the mesh."""
    ways = rows(mesh)
    if accumulate < 1 or batch % (ways * accumulate):
        raise ValueError(
            f"a batch of {batch} does not divide into {accumulate} micro-batches over data x fsdp = {ways} "
            f"devices; make it a multiple of {ways * max(accumulate, 1)} or change the mesh"
        )


def check_space(space: Sequence[int], mesh: Mesh) -> None:
    """Raises ValueError unless the longest spatial axis of the data divides over the mesh's axis space."""
    ways = mesh.shape["space"]
    if ways > 1 and max(space) % ways:
        raise ValueError(
            f"the longest axis of data of the size {tuple(space)} does not divide over space = {ways} devices; "
            "change data.size or mesh.space"
        )


@functools.cache
def share(mesh: Mesh) -> tuple[int, int]:
    """Which of how many equal parts of every batch this process feeds: (index, count).

    Processes whose devices hold the same rows (where tensor or space goes through several processes) feed the same.

    Raises:
      ValueError: the rows that this process' devices hold are not next to each other.
    """
    parts = np.arange(rows(mesh)).reshape(*(mesh.shape[axis] for axis in ROWS), 1, 1)
    held = np.broadcast_to(parts, mesh.devices.shape).flat
    here = jax.process_index()
    mine = {int(i) for i, d in zip(held, mesh.devices.flat, strict=True) if d.process_index == here}
    first, size = min(mine, default=0), len(mine)
    if not size or max(mine) - first + 1 != size or first % size or rows(mesh) % size:
        raise ValueError(
            f"process {here} would feed the parts {sorted(mine)} of {rows(mesh)} of every batch, which are no block; "
            "let mesh.data be a multiple of the number of processes, or mesh.dcn name data alone"
        )
    return first // size, rows(mesh) // size


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_layouts(mesh: Mesh, batch: Any) -> Any:
    """A sharding for every field of a batch of arrays or shapes; those of the data's spatial shape go over space."""
    space = batch["x"].shape[1:-1] if isinstance(batch, Mapping) and "x" in batch else ()
    longest = space.index(max(space)) if space else 0

    def one(field):
        if space and mesh.shape["space"] > 1 and field.shape[1:-1] == space:
            return NamedSharding(mesh, PartitionSpec(ROWS, *(None,) * longest, "space"))
        return NamedSharding(mesh, PartitionSpec(ROWS))

    return jax.tree.map(one, batch)


def _layout(
    mesh: Mesh, name: str, shape: tuple[int, ...], value: Layout, trained: bool
) -> NamedSharding:
    """The layout of a parameter, or (unless `trained`) of what is kept beside it: its average, its moments."""
    if value == "replicate" or (value == "zero1" and trained):
        return replicated(mesh)
    if value in ("fsdp", "zero1"):
        ways = mesh.shape["fsdp"]
        axes = [i for i, size in enumerate(shape) if size % ways == 0]
        if ways == 1 or not axes or math.prod(shape) < FSDP_MIN_SIZE:
            return replicated(mesh)
        largest = max(axes, key=lambda i: shape[i])
        return NamedSharding(mesh, PartitionSpec(*(None,) * largest, "fsdp"))
    if isinstance(value, str):
        raise ValueError(
            f"the layout {value!r} is unknown; choose 'replicate', 'fsdp', 'zero1' or a tuple of mesh axes"
        )
    if len(value) != len(shape):
        raise ValueError(
            f"the layout {tuple(value)} of {name!r} has {len(value)} axes, the array has {shape}"
        )
    for axis, size in zip(value, shape, strict=True):
        if axis is not None and axis not in AXES:
            raise ValueError(
                f"the layout of {name!r} names the mesh axis {axis!r}; choose among {AXES}"
            )
        if axis is not None and size % mesh.shape[axis]:
            raise ValueError(
                f"an axis of {size} of {name!r} does not divide over {mesh.shape[axis]} devices ({axis})"
            )
    return NamedSharding(mesh, PartitionSpec(*value))


def layouts(
    mesh: Mesh, rules: Sequence[tuple[str, Layout]], params: Any, trained: bool = True
) -> Any:
    """A sharding for every leaf of `params` (arrays or shapes), by the first rule that matches its name.

    With `trained` off, those of what is kept beside the parameters.

    Raises:
      ValueError: a leaf without a rule, a rule without a leaf, or a layout that does not fit its array.
    """
    values = tree.map_by_rule(rules, params)
    return tree.map_named(
        lambda name, leaf, value: _layout(mesh, name, leaf.shape, value, trained), params, values
    )


def state_layouts(mesh: Mesh, rules: Sequence[tuple[str, Layout]], state: Any) -> Any:
    """Shardings of a TrainState: the optimizer and the average lie as the parameters that they belong to.

    A leaf of the optimizer belongs to the parameter whose name its own name ends with, if the shapes agree; counters
    and factored moments are replicated.
    """
    beside = layouts(mesh, rules, state.params, trained=False)
    shapes = dict(zip(tree.names(state.params), jax.tree.leaves(state.params), strict=True))
    by_name = dict(zip(tree.names(beside), jax.tree.leaves(beside), strict=True))

    def follow(name, leaf):
        parts = name.split("/")
        for i in range(len(parts)):
            owner = "/".join(parts[i:])
            if owner in by_name and shapes[owner].shape == leaf.shape:
                return by_name[owner]
        return replicated(mesh)

    found = tree.map_named(follow, state)
    return found.replace(params=layouts(mesh, rules, state.params))


def on(mesh: Mesh, f: Callable[..., Any]) -> Callable[..., Any]:
    """`f` as it is traced with the mesh in context: kernels that XLA cannot split are split there (`nn.attend`)."""

    @functools.wraps(f)
    def traced(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return f(*args)

    return traced


def place(mesh: Mesh, batch: Any) -> Any:
    """The global batch on the mesh, arrays by their names, from this process's part of it (`share`)."""
    return _placed(mesh, batch, *share(mesh))


def spread(mesh: Mesh, batch: Any) -> Any:
    """A batch on the mesh of which every process has all rows."""
    return _placed(mesh, batch, 0, 1)


def _placed(mesh: Mesh, batch: Any, index: int, count: int) -> Any:
    def one(field, layout):
        shape = (count * field.shape[0], *field.shape[1:])
        before = index * field.shape[0]

        def part(at):
            start, stop, _ = at[0].indices(shape[0])
            return field[(slice(start - before, stop - before), *at[1:])]

        return jax.make_array_from_callback(shape, layout, part)

    batch = jax.tree.map(np.asarray, batch)
    return jax.tree.map(one, batch, batch_layouts(mesh, batch))


def round_up(count: int, mesh: Mesh) -> int:
    """The smallest batch of at least `count` that divides over the mesh."""
    return -(-count // rows(mesh)) * rows(mesh)
