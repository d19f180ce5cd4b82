"""Several conditions as one: behind each other in one batch, or blended into one."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ldm_jax.diffusion.process import over
from ldm_jax.types import Cond

FIELDS = ("vector", "tokens", "spatial")


def join(conds: Sequence[Cond], batch: int) -> Cond:
    """k conditions one after the other, [k b]; token lists of unequal length are padded.

    Fields have `batch` rows or one. Residuals and controls that a condition lacks are the first one's: guidance is then
    away from the picture that the other fields' absence gives, with the same hints.

    Raises:
      ValueError: a field that one condition has and another lacks.
    """
    fields, mask = {}, None
    for name, rows in _fields(conds).items():
        fields[name] = [jnp.broadcast_to(a, (batch, *a.shape[1:])) for a in rows]
    if "tokens" in fields:
        fields["tokens"], masks = _padded(fields["tokens"], [c.mask for c in conds])
        if masks is not None:
            mask = jnp.concatenate([jnp.broadcast_to(m, (batch, m.shape[1])) for m in masks])
    return Cond(
        **{name: jnp.concatenate(rows) for name, rows in fields.items()},
        mask=mask,
        **{name: _steering(name, conds, batch) for name in ("residuals", "controls")},
    )


def blend(conds: Sequence[Cond], weights: Sequence[ArrayLike]) -> Cond:
    """One condition between several: the weighted mean of their vectors, tokens and maps.

    Weights are scalars or one a sample, [b], are divided by their sum and may be traced. The i-th token is the mean
    over the conditions that have one there. Residuals and controls are those of the first condition.

    Raises:
      ValueError: no condition, another number of weights, or a field that one condition has and another lacks.
    """
    if not conds or len(conds) != len(weights):
        raise ValueError(f"{len(conds)} conditions and {len(weights)} weights; give one for each")

    def mean(rows, shares):
        total = sum(shares)
        total = jnp.where(total == 0, 1, total)  # of tokens that nobody has
        return sum(over_each(s / total, a) * a for s, a in zip(shares, rows, strict=True))

    def over_each(share, a):
        return share if share.ndim == a.ndim else over(share, a)

    found, mask = _fields(conds), None
    shares = [jnp.asarray(w, jnp.float32) for w in weights]
    fields = {k: mean(v, shares) for k, v in found.items() if k != "tokens"}
    if "tokens" in found:
        tokens, masks = _padded(found["tokens"], [c.mask for c in conds])
        if masks is None:
            fields["tokens"] = mean(tokens, shares)
        else:
            there = [
                m[..., None] * over(s, m[..., None]) for m, s in zip(masks, shares, strict=True)
            ]
            fields["tokens"] = mean(tokens, there)
            mask = jnp.stack(jnp.broadcast_arrays(*masks)).any(0)
    return conds[0].replace(**fields, mask=mask)


def _fields(conds):
    """{name: its values}, of the fields that all conditions have."""
    found = {}
    for name in FIELDS:
        rows = [getattr(c, name) for c in conds]
        given = [r is not None for r in rows]
        if any(given) and not all(given):
            names = [
                "condition",
                *(f"condition {i}" for i in range(2, len(conds))),
                "null condition",
            ]
            raise ValueError(
                f"the {names[given.index(True)]} has the field {name!r} and the {names[given.index(False)]} has not; "
                "make them with one conditioner"
            )
        if any(given):
            found[name] = rows
    return found


def _steering(name: str, conds: Sequence[Cond], batch: int) -> Any:
    """Residuals or controls of all; their scalars and single rows become one a sample."""
    first = getattr(conds[0], name)
    every = [getattr(c, name) or first for c in conds]
    if any(jax.tree.structure(first) != jax.tree.structure(other) for other in every):
        raise ValueError(
            f"the {name} of the condition and those of the null condition are not as many; "
            "give the null condition as many, or none to use the condition's"
        )

    def rows(a):
        a = jnp.asarray(a)
        return jnp.broadcast_to(a, (batch, *a.shape[1:]))

    return jax.tree.map(lambda *leaves: jnp.concatenate([rows(a) for a in leaves]), *every)


def _padded(tokens, masks):
    """The token lists at the longest one's length, and a mask each; None where every token counts."""
    n = max(a.shape[1] for a in tokens)
    if all(m is None for m in masks) and all(a.shape[1] == n for a in tokens):
        return tokens, None
    masks = [
        jnp.ones((1, a.shape[1]), bool) if m is None else m
        for a, m in zip(tokens, masks, strict=True)
    ]
    masks = [jnp.pad(m, ((0, 0), (0, n - m.shape[1]))) for m in masks]
    return [jnp.pad(a, ((0, 0), (0, n - a.shape[1]), (0, 0))) for a in tokens], masks
