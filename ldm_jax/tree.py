"""Names for the leaves of a pytree, and rules on those names.

One mechanism serves sharding, weight decay, freezing and partial loading: a tuple of `(regex, value)`, of which the
first that matches the whole name of a leaf ("decoder/conv_out/kernel") decides.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax


def name_of(path: tuple) -> str:
    """The name of a leaf: the keys on the way to it, joined by slashes."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def names(tree: Any) -> list[str]:
    return [name_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def count(tree: Any) -> int:
    """How many numbers the arrays, or shapes, of a tree hold."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def map_named(f: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """`f(name, leaf, ...)` at every leaf."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaf: f(name_of(path), *leaf), tree, *rest
    )


def map_by_rule(rules: Sequence[tuple[str, Any]], tree: Any) -> Any:
    """The value of the first rule whose regex matches the whole name of the leaf, for every leaf.

    Raises:
      ValueError: a leaf that no rule matches, or a rule that matches no leaf (a final ".*" may be idle).
    """
    every = names(tree)
    # A pattern that an earlier one leaves nothing to is no typo; one that fits no name is.
    dead = [p for p, _ in rules if p != ".*" and not any(re.fullmatch(p, name) for name in every)]
    if dead:
        raise ValueError(f"the rules {dead} match no leaf; the leaves are named like {every[:5]}")

    def value_of(name, _):
        for pattern, value in rules:
            if re.fullmatch(pattern, name):
                return value
        raise ValueError(f"no rule matches the leaf {name!r}; add one to {[p for p, _ in rules]}")

    return map_named(value_of, tree)
