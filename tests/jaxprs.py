"""What a traced function consists of."""

import jax


def occurrences(jaxpr, names):
    """How often primitives of these names run; what several calls share is counted at each of them."""
    total = 0
    for eqn in jaxpr.eqns:
        total += eqn.primitive.name in names
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += occurrences(inner, names)
    return total


def remats(f, *args):
    """How many blocks are marked to be computed anew in the backward pass."""
    return occurrences(jax.make_jaxpr(f)(*args).jaxpr, ("remat2", "checkpoint"))
