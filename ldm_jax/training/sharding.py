"""Where arrays live: one mesh with the axes data, fsdp and tensor, and regex rules on parameter names.

A rule's value is a layout: "replicate", "fsdp" (the largest axis that divides, if the array is large enough), or an
explicit tuple with one mesh axis or None per array axis. Batches are split over data and fsdp together.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ldm_jax import tree

AXES = ("data", "fsdp", "tensor")
FSDP_MIN_SIZE = 2**14  # smaller arrays are cheaper to copy than to gather

Layout = str | Sequence[str | None]


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh over all devices; one axis may be -1 and takes what is left.

    Raises:
      ValueError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = [data, fsdp, tensor]
    if shape.count(-1) > 1:
        raise ValueError(
            f"mesh {dict(zip(AXES, shape, strict=True))} has more than one -1; fix all but one"
        )
    known = math.prod(s for s in shape if s != -1)
    shape = [len(devices) // known if s == -1 else s for s in shape]
    if min(shape) < 1 or math.prod(shape) != len(devices):
        raise ValueError(
            f"mesh data={data}, fsdp={fsdp}, tensor={tensor} does not fit the {len(devices)} devices; "
            "their product must be the number of devices (one may be -1)"
        )
    return Mesh(np.asarray(devices).reshape(shape), AXES)


def check_batch(batch: int, mesh: Mesh, accumulate: int = 1) -> None:
    """Raises ValueError unless every micro-batch divides evenly over the mesh."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if accumulate < 1 or batch % (ways * accumulate):
        raise ValueError(
            f"a batch of {batch} does not divide into {accumulate} micro-batches over data x fsdp = {ways} "
            f"devices; make it a multiple of {ways * max(accumulate, 1)} or change the mesh"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_layout(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def _layout(mesh: Mesh, name: str, shape: tuple[int, ...], value: Layout) -> NamedSharding:
    if value == "replicate":
        return replicated(mesh)
    if value == "fsdp":
        ways = mesh.shape["fsdp"]
        axes = [i for i, size in enumerate(shape) if size % ways == 0]
        if ways == 1 or not axes or math.prod(shape) < FSDP_MIN_SIZE:
            return replicated(mesh)
        largest = max(axes, key=lambda i: shape[i])
        return NamedSharding(mesh, PartitionSpec(*(None,) * largest, "fsdp"))
    if isinstance(value, str):
        raise ValueError(
            f"the layout {value!r} is unknown; choose 'replicate', 'fsdp' or a tuple of mesh axes"
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


def layouts(mesh: Mesh, rules: Sequence[tuple[str, Layout]], params: Any) -> Any:
    """A sharding for every leaf of `params` (arrays or shapes), by the first rule that matches its name.

    Raises:
      ValueError: a leaf without a rule, a rule without a leaf, or a layout that does not fit its array.
    """
    values = tree.map_by_rule(rules, params)
    return tree.map_named(
        lambda name, leaf, value: _layout(mesh, name, leaf.shape, value), params, values
    )


def state_layouts(mesh: Mesh, rules: Sequence[tuple[str, Layout]], state: Any) -> Any:
    """Shardings of a TrainState: the optimizer and the EMA lie as the parameters that they belong to.

    A leaf of the optimizer belongs to the parameter whose name its own name ends with, if the shapes agree; counters
    and factored moments are replicated.
    """
    params = layouts(mesh, rules, state.params)
    shapes = dict(zip(tree.names(state.params), jax.tree.leaves(state.params), strict=True))
    by_name = dict(zip(tree.names(params), jax.tree.leaves(params), strict=True))

    def follow(name, leaf):
        parts = name.split("/")
        for i in range(len(parts)):
            owner = "/".join(parts[i:])
            if owner in by_name and shapes[owner].shape == leaf.shape:
                return by_name[owner]
        return replicated(mesh)

    return tree.map_named(follow, state)


def place(mesh: Mesh, batch: Any) -> Any:
    """The global batch, arrays by their names, on the mesh, from this process's part of it."""
    return jax.make_array_from_process_local_data(batch_layout(mesh), batch)


def round_up(count: int, mesh: Mesh) -> int:
    """The smallest batch of at least `count` that divides over the mesh."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    return -(-count // ways) * ways
