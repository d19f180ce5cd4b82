"""Steering a network by others: what ControlNets tell it to add, at the same (x, t, cond), scaled and summed.

    with_controls(network, first, second)(x, t, cond)

asks each of them for its residuals on the hint in `cond.controls`, in the same order. Guidance goes around it, like
around any network, and doubles hints and scales with the rest of the condition.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from ldm_jax.diffusion.process import over
from ldm_jax.types import Cond, Control, Network, Residuals

# (x, t, cond, hint) -> Residuals: a ControlNet with its parameters
Steer = Callable[[Float[Array, "b *space c"], Float[Array, " b"], Cond, Array], Residuals]


def combine(residuals: Sequence[Residuals], scales: Sequence[ArrayLike]) -> Residuals:
    """The weighted sum; a scale is a scalar or one value a sample, [b], and may be traced.

    Raises:
      ValueError: none, or another number of scales.
    """
    if not residuals or len(residuals) != len(scales):
        raise ValueError(
            f"{len(residuals)} residuals and {len(scales)} scales; give at least one, and a scale for each"
        )

    def scaled(one, scale):
        return jax.tree.map(lambda r: over(jnp.asarray(scale, r.dtype), r) * r, one)

    total, *rest = map(scaled, residuals, scales)
    for more in rest:
        total = jax.tree.map(jnp.add, total, more)
    return total


def scale_at(control: Control, t: Float[Array, " b"]) -> Float[Array, " b"]:
    """The control's scale for lo <= t <= hi, 0 elsewhere."""
    return jnp.where((t >= control.lo) & (t <= control.hi), control.scale, 0.0).astype(t.dtype)


def with_controls(network: Network, *nets: Steer) -> Network:
    """The network with the residuals of `nets`, one for each of `cond.controls`; a `Network` again.

    A net whose scale is 0 for the whole batch, as it is outside of its interval, is not run.

    Raises:
      ValueError: another number of controls than of nets.
    """

    def steered(x, t, cond):
        if len(cond.controls) != len(nets):
            raise ValueError(
                f"the condition has {len(cond.controls)} controls for {len(nets)} ControlNets; give one for each"
            )
        if not nets:
            return network(x, t, cond)
        plain = cond.replace(controls=(), residuals=None)
        scales = [scale_at(control, t) for control in cond.controls]
        found = [
            _unless_zero(net, scale, x, t, plain, control.hint)
            for net, scale, control in zip(nets, scales, cond.controls, strict=True)
        ]
        if cond.residuals is not None:
            found, scales = [*found, cond.residuals], [*scales, 1.0]
        return network(x, t, plain.replace(residuals=combine(found, scales)))

    return steered


def _unless_zero(net: Steer, scale: Array, *inputs) -> Residuals:
    shapes = jax.eval_shape(net, *inputs)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return lax.cond(jnp.any(scale != 0), lambda: net(*inputs), lambda: zeros)


def guess(residuals: Residuals) -> Residuals:
    """From 0.1 at the finest skip to 1 in the middle, evenly in the logarithm: Zhang et al.'s guess mode.

    There the unconditional half of guidance is not steered: give its `Control` a scale of 0.
    """
    every = (*residuals.skips, residuals.mid)
    scales = np.logspace(-1, 0, len(every)).tolist()
    *skips, mid = (r * s for r, s in zip(every, scales, strict=True))
    return Residuals(tuple(skips), mid)
