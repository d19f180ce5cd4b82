"""Ways to lay a run out (layouts by name, what is computed again), and what is foreseen of each before any compile."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ldm_jax.build import parts, plan, updates
from ldm_jax.flops import flops
from ldm_jax.foresee import memory
from ldm_jax.foresee.chips import Chip
from ldm_jax.foresee.search import Choice
from ldm_jax.foresee.study import Program
from ldm_jax.nn import once
from ldm_jax.training import sharding

# As in docs/scale.md, the simplest first.
LAYOUTS = {
    "data": (dict(data=-1, fsdp=1, tensor=1, space=1), ((".*", "replicate"),)),
    "zero1": (dict(data=1, fsdp=-1, tensor=1, space=1), ((".*", "zero1"),)),
    "fsdp": (dict(data=1, fsdp=-1, tensor=1, space=1), ((".*", "fsdp"),)),
}
SEARCHED = ("batch", "remat", "layout")
REMATS = (False, *sorted(once.KEEP), True)
OF_ROWS = {"batch", "conditions", "keys"}  # of a program's inputs, those that grow with the batch


class Variant(NamedTuple):
    """A run with one layout and one `remat`, over all devices."""

    name: str
    config: ConfigDict
    of: plan.Plan
    mesh: Mesh

    def program(self, what: str, rows: int) -> Program:
        """See `plan.program`."""
        return plan.program(self.config, self.of, self.mesh, what, rows)


def variants(
    config: ConfigDict, first_stage: ConfigDict | None, devices: Sequence[Any], over: Sequence[str]
) -> list[Variant]:
    """The config as it is, or every choice of what `over` names, of "remat" and "layout".

    Raises:
      ValueError, FileNotFoundError: as `plan.plan`; or the network has no `remat`.
    """
    found = []
    for remat in REMATS if "remat" in over else (None,):
        again = config if remat is None else _with_remat(config, remat)
        of = plan.plan(again, first_stage)
        for layout in LAYOUTS if "layout" in over else (None,):
            laid = again if layout is None else _with_layout(again, layout)
            said = [f"layout {layout}"] * (layout is not None)
            said += [f"remat {remat}"] * (remat is not None)
            name = ", ".join(said) or "as the config has it"
            found.append(Variant(name, laid, of, parts.mesh(laid, devices)))
    return found


def _copy(config: ConfigDict) -> ConfigDict:
    return ConfigDict(config.to_dict())


def _with_layout(config: ConfigDict, name: str) -> ConfigDict:
    changed = _copy(config)
    changed.mesh, changed.sharding = LAYOUTS[name]
    return changed


def _with_remat(config: ConfigDict, remat: bool | str) -> ConfigDict:
    changed = _copy(config)
    with changed.ignore_type():
        (changed.init if "init" in changed else changed.model).remat = remat
    return changed


def choices(of: Sequence[Variant], what: str, chip: Chip) -> list[Choice]:
    """What is foreseen of each; those that share a plan share its trace."""
    foreseen = functools.cache(lambda i: _foreseen(of[i], what))
    first = [next(j for j, other in enumerate(of) if other.of is one.of) for one in of]
    return [_choice(one, foreseen(i), what, chip) for one, i in zip(of, first, strict=True)]


def _foreseen(of: Variant, what: str) -> tuple[memory.Trace, float]:
    """The trace of a device's part, and the operations of a row."""
    one = sharding.make_mesh(devices=[of.mesh.devices.flat[0]])
    _, _, times = updates.optimizer_of(of.config)

    def make(rows):
        program = plan.program(of.config, of.of, one, what, rows)
        return program.call, list(program.inputs.values())

    call, inputs = make(times)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), inputs)
    return memory.trace(make, one, (8 * times, 16 * times)), flops(call, *shapes) / times


def _choice(of: Variant, foreseen: tuple[memory.Trace, float], what: str, chip: Chip) -> Choice:
    trace, operations = foreseen
    device, times = chip.of_device(), updates.optimizer_of(of.config)[2]
    small, large = (of.program(what, n * times * of.mesh.size).inputs for n in (1, 2))
    at, to = memory.of_inputs(small), memory.of_inputs(large)
    kept = [leaf for k in small.keys() - OF_ROWS for leaf in jax.tree.leaves(small[k])]
    sent = sum(map(_sent, jax.tree.leaves(small["parameters"]))) if what == "train" else 0

    def seconds(rows):
        return max(operations * rows / device.flops, sent / device.links)

    return Choice(
        of.name,
        inputs=lambda rows: at + (to - at) * (rows / times - 1),
        temporary=functools.cache(
            functools.partial(memory.temporary, trace, shares=memory.shares(kept))
        ),
        seconds=seconds,
    )


def _sent(leaf: Any) -> int:
    """Bytes of a parameter that leave a device in a step: its gradient is added up, or it is gathered twice before."""
    split = leaf.sharding.shard_shape(leaf.shape) != leaf.shape
    return (3 if split else 2) * math.prod(leaf.shape) * leaf.dtype.itemsize
