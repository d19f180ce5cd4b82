"""LoRA: changes of kernels that are products of thin matrices (Hu et al. 2022), and their kin of LyCORIS.

    W + weight · (alpha / rank) · down @ mid @ up        down [*space in rank], mid [*space rank rank], up [rank out]

in the axes of our kernels, so that the product has the kernel's shape whatever the number of spatial axes: of a dense
layer, of a convolution (a wide `down` and a 1x1 `up`), or with `mid` of one whose space is in the middle (the CP form
of LoCon). Two relatives differ by a product (Yeh et al. 2024): LoHa multiplies two such matrices element by element
(`times`), LoKr takes the Kronecker product with a small one (`outer`). DoRA (Liu et al. 2024) then gives the columns of
the sum, one for each output, the lengths that it learnt (`magnitude`):

    magnitude · V / |V|,    V = W + weight · (alpha / rank) · down @ up

so that the weight scales the change of the direction, as in PEFT, and the length is the learnt one at any weight. Of
several LoRAs each starts from what the one before it gave.

A LoRA is a mapping from the names of our leaves to such deltas, for one network. It is put into the parameters for good
(`merge`), or as a part of the computation (`applied`), which needs no change in any module: (W + delta) x is the same
as W x + up(down(x)).
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ldm_jax import tree
from ldm_jax.nn import conv
from ldm_jax.types import Params
from ldm_jax.weights import table


class Delta(NamedTuple):
    """The change of one kernel; a pytree, whose leaves may be arrays of numpy or jax in any float type."""

    down: Any  # [*space in rank]
    up: Any  # [rank out]
    alpha: Any  # []; the change is scaled by alpha / rank
    mid: Any = None  # [*space rank rank]; `down` is then [in rank]
    times: Any = None  # another (down, mid, up), multiplied element by element
    outer: Any = None  # [n m], the left factor of a Kronecker product over the axes in and out
    magnitude: Any = None  # [out], the lengths of the changed kernel's columns


Lora = Mapping[str, Delta]  # from names of leaves: "down_0/attn_0/block_0/self_attn/q/kernel"

_product = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def change(delta: Delta) -> Float[Array, "*space i o"]:
    """What is added to the kernel at a weight of one, before it gets its `magnitude`, in float32."""
    down, up, alpha, mid, times, outer, _ = jax.tree.map(
        lambda x: jnp.asarray(x).astype(jnp.float32), delta
    )

    def chain(down, mid, up):
        return _product(down if mid is None else _product(down, mid), up)

    kernel = chain(down, mid, up)
    if times is not None:
        kernel = kernel * chain(*times)
    if outer is not None:
        kernel = jnp.kron(outer.reshape((1,) * (kernel.ndim - 2) + outer.shape), kernel)
    return alpha / down.shape[-1] * kernel


def _changed(leaf: Array, deltas: Sequence[Delta], weights: Sequence[Any]) -> Array:
    """The leaf plus the weighted changes, computed in float32 and cast back once."""
    total = leaf.astype(jnp.float32)
    for delta, weight in zip(deltas, weights, strict=True):
        total = total + weight * change(delta)
        if delta.magnitude is not None:
            square = jnp.sum(total**2, axis=range(total.ndim - 1))
            total = total * (delta.magnitude.astype(jnp.float32) / jnp.sqrt(square))
    return total.astype(leaf.dtype)


def applied(params: Params, loras: Sequence[Lora], weights: Sequence[Any] | Array) -> Params:
    """The parameters with every LoRA added at its weight; for use inside of jit.

    LoRAs and weights are arguments of the jitted function, so that other weights, or another LoRA of the same ranks, do
    not compile anew: `jit(lambda params, loras, weights, x: network.apply({"params": applied(...)}, x))`. Call it
    outside of a sampler's loop, so that the kernels are computed once. It can be differentiated: training a LoRA is
    training `down` and `up`.

    Raises:
      ValueError: a leaf that the parameters lack or of another shape, or not one weight for each LoRA.
    """
    _check(params, loras, weights)

    def one(name, leaf):
        using = [(lora[name], w) for lora, w in zip(loras, weights, strict=True) if name in lora]
        return _changed(leaf, *zip(*using, strict=True)) if using else leaf

    return tree.map_named(one, params)


def merge(params: Params, loras: Sequence[Lora], weights: Sequence[float]) -> Params:
    """The parameters with every LoRA added at its weight, leaf by leaf; types and shardings stay.

    A weight of the other sign takes a LoRA out again, up to rounding; but no DoRA.

    Raises:
      ValueError: as `applied` does, before the first leaf is computed.
    """
    _check(params, loras, weights)

    def one(name, leaf):
        using = [(lora[name], w) for lora, w in zip(loras, weights, strict=True) if name in lora]
        if not using:
            return leaf
        where = leaf.sharding if isinstance(leaf, jax.Array) else None
        return jax.jit(_changed, out_shardings=where)(leaf, *zip(*using, strict=True))

    return tree.map_named(one, params)


def _check(params: Params, loras: Sequence[Lora], weights: Any) -> None:
    """Raises: ValueError: the LoRAs do not fit these parameters, or the weights not the LoRAs."""
    if len(loras) != len(weights):
        raise ValueError(f"{len(loras)} LoRAs have {len(weights)} weights; give one for each")
    shapes = {n: x.shape for n, x in zip(tree.names(params), jax.tree.leaves(params), strict=True)}
    for i, lora in enumerate(loras):
        absent = sorted(lora.keys() - shapes.keys())
        wrong = [
            f"{name!r} {has} instead of {shapes[name]}"
            for name, has in ((n, jax.eval_shape(change, lora[n]).shape) for n in lora)
            if name in shapes and has != shapes[name]
        ]
        if absent or wrong:
            raise ValueError(
                f"LoRA {i} is not for these parameters: {len(absent)} leaves are not there "
                f"({', '.join(map(repr, absent[: table.NAMED]))}), {len(wrong)} have another shape "
                f"({', '.join(wrong[: table.NAMED])}); read it with the names of this network"
            )


def init(params: Params, pattern: str, rank: int, key: Array) -> dict[str, Delta]:
    """A LoRA to be trained for the kernels whose whole names match the regex; it changes nothing yet.

    `down` is drawn like the layers themselves and `up` is zero (Hu et al. 2022, section 4.1); alpha is the rank, and no
    parameter: differentiate by `down` and `up` only.

    Raises:
      ValueError: a pattern that matches no kernel, or a rank below one.
    """
    named = dict(zip(tree.names(params), jax.tree.leaves(params), strict=True))
    chosen = [n for n in named if n.endswith("/kernel") and re.fullmatch(pattern, n)]
    if not chosen or rank < 1:
        raise ValueError(
            f"the pattern {pattern!r} with rank {rank} makes no LoRA; give a rank of at least one and a regex for the "
            f"whole names of kernels, which are like {[n for n in named if n.endswith('/kernel')][:3]}"
        )

    def one(name, key):
        *space, into, out = named[name].shape
        down = conv.fan_in_uniform(key, (*space, into, rank), jnp.float32)
        return Delta(down, jnp.zeros((rank, out)), jnp.float32(rank))

    keys = jax.random.split(key, len(chosen))
    return {name: one(name, key) for name, key in zip(chosen, keys, strict=True)}


def export(lora: Lora, component: str, rows: table.Table) -> dict[str, np.ndarray]:
    """A LoRA as the tensors that diffusers and PEFT read, for `files.write`; `component` is "unet", "text_encoder" ...

    alpha / rank goes into `up`, and `mid` into `down`, since such a file has no place for them: with them at one and
    None, tensors come back as they are.

    Raises:
      ValueError: a delta that is no product of two matrices, or a leaf that has no tensor of its own there.
    """
    tensors = {}
    for name, delta in lora.items():
        place = table.find(rows, name)
        if place is None or place.layout.of > 1 or not place.name.endswith(".weight"):
            raise ValueError(
                f"the table has no tensor of its own for our leaf {name!r}; give the table of diffusers' names"
            )
        if any(x is not None for x in (delta.times, delta.outer, delta.magnitude)):
            raise ValueError(
                f"the change of {name!r} is a LoHa, LoKr or DoRA and no product of two matrices; merge it instead"
            )
        down, up = np.asarray(delta.down), np.asarray(delta.up)
        if delta.mid is not None:
            down = np.asarray(_product(down.astype(np.float32), delta.mid), down.dtype)
        if (scale := float(delta.alpha) / down.shape[-1]) != 1:
            up = (scale * up.astype(np.float32)).astype(up.dtype)
        up = up.reshape((1,) * (down.ndim - 2) + up.shape)
        layout = table.Layout(ones=place.layout.ones)
        module = f"{component}.{place.name.removesuffix('.weight')}"
        for part, array in {"A": down, "B": up}.items():
            tensor = table.to_theirs(name, array, layout)
            tensors[f"{module}.lora_{part}.weight"] = np.ascontiguousarray(tensor)
    return tensors
