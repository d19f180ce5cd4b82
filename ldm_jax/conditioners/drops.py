"""Which rows of a batch lose which of their fields, and what stands there then."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool

from ldm_jax.types import Batch

Drop = dict[str, Bool[Array, " b"]]


def draw_drops(
    rng: Array,
    fields: Sequence[str],
    rates: Mapping[str, float | int] | float | int,
    batch_size: int,
) -> Drop:
    """Which rows lose which field, independently: one rate for all or one each (none given: 0).

    Raises:
      ValueError: a rate for a field that is not among `fields`, or a rate outside [0, 1].
    """
    if not isinstance(rates, Mapping):
        rates = dict.fromkeys(fields, rates)
    unknown = sorted(set(rates) - set(fields))
    if unknown:
        raise ValueError(f"drop rates for {unknown}, but the conditioner reads {list(fields)}")
    wrong = {field: rate for field, rate in rates.items() if not 0 <= rate <= 1}
    if wrong:
        raise ValueError(f"the drop rates {wrong} are no probabilities; give numbers from 0 to 1")
    return {
        field: jax.random.bernoulli(
            jax.random.fold_in(rng, i), float(rates.get(field, 0)), (batch_size,)
        )
        for i, field in enumerate(fields)
    }


def drop_all(fields: Sequence[str], batch_size: int) -> Drop:
    """Every row loses every field: the null condition."""
    return {field: jnp.ones(batch_size, bool) for field in fields}


def read(module: nn.Module, batch: Batch, field: str) -> Array:
    if field not in batch:
        raise ValueError(
            f"the conditioner {type(module).__name__} reads the field {field!r}, "
            f"the batch has {sorted(batch)}"
        )
    return batch[field]


def replace_dropped(x: Array, drop: Drop | None, field: str, null: Array | int | float) -> Array:
    """`x` with `null` in the rows that lose `field`."""
    if drop is None or field not in drop:
        return x
    rows = drop[field]
    if rows.shape != x.shape[:1]:
        raise ValueError(
            f"drop[{field!r}] has the shape {rows.shape}, the batch has {x.shape[0]} rows"
        )
    return jnp.where(rows.reshape(-1, *(1,) * (x.ndim - 1)), jnp.asarray(null, x.dtype), x)
