"""Several conditioners as one."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array

from ldm_jax.conditioners.drops import Drop
from ldm_jax.conditioners.fields import Label, Spatial
from ldm_jax.types import Batch, Cond


def counted(conditioner: nn.Module | None) -> dict[str, range]:
    """The fields of class numbers that a conditioner reads, and the numbers that it knows; -1 is no class, in maps."""
    if isinstance(conditioner, Combine):
        return {
            field: known for part in conditioner.parts for field, known in counted(part).items()
        }
    if isinstance(conditioner, Label):
        return {conditioner.field: range(conditioner.classes)}
    if isinstance(conditioner, Spatial) and conditioner.classes:
        return {conditioner.field: range(-1, conditioner.classes)}
    return {}


class Combine(nn.Module):
    """Several conditioners as one.

    Vectors and spatial maps are joined along their channels, tokens one after the other. Parameters
    lie under parts_0, parts_1 ... in the order given.
    """

    parts: Sequence[nn.Module]

    @property
    def fields(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(field for part in self.parts for field in part.fields))

    @nn.compact
    def __call__(self, batch: Batch, drop: Drop | None = None) -> Cond:
        conds = [part(batch, drop) for part in self.parts]

        def join(name: str, axis: int) -> Array | None:
            arrays = [getattr(cond, name) for cond in conds if getattr(cond, name) is not None]
            shapes = [a.shape for a in arrays]
            others = {(*shape[:axis], *shape[len(shape) + axis + 1 :]) for shape in shapes}
            if len(others) > 1:
                raise ValueError(
                    f"the conditioners' {name} of shapes {shapes} cannot be joined along "
                    f"axis {axis}; make their other axes equal"
                )
            return jnp.concatenate(arrays, axis) if arrays else None

        # A part without a mask wants all its tokens to be read, as soon as another part masks some.
        if any(cond.mask is not None for cond in conds):
            conds = [
                cond.replace(mask=jnp.ones(cond.tokens.shape[:2], bool))
                if cond.tokens is not None and cond.mask is None
                else cond
                for cond in conds
            ]
        return Cond(
            vector=join("vector", -1),
            tokens=join("tokens", -2),
            mask=join("mask", -1),
            spatial=join("spatial", -1),
        )
