"""The norm of the gradient by groups of layers, for the log."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ldm_jax import tree
from ldm_jax.types import Params

Rules = Sequence[
    tuple[str, str]
]  # (regex, name of a group); the first that matches a leaf's name decides
DEPTH = (
    2  # parts of a leaf's name that are its group: "network/down_0" of "network/down_0/conv/kernel"
)


def by_module(params: Params) -> Any:
    """The group of each leaf: the top-level module that it is of."""
    return tree.map_named(lambda name, _: "/".join(name.split("/")[:-1][:DEPTH]) or name, params)


def grouped(rules: Rules | bool, gradient: Params) -> dict[str, Float[Array, ""]]:
    """`grad_norm/GROUP` of each group; by module where `rules` is True, nothing where it is False.

    Raises:
      ValueError: a leaf without a rule, or a rule without a leaf.
    """
    if rules is False:
        return {}
    groups = by_module(gradient) if rules is True else tree.map_by_rule(rules, gradient)
    squares = defaultdict(float)
    for group, leaf in zip(jax.tree.leaves(groups), jax.tree.leaves(gradient), strict=True):
        squares[group] += jnp.sum(jnp.square(leaf.astype(jnp.float32)))
    return {f"grad_norm/{group}": jnp.sqrt(square) for group, square in squares.items()}
