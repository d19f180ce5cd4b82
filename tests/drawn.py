"""Parameters for tests without compiling an initialiser, which takes longer than all that is tested."""

import jax
import jax.numpy as jnp
import numpy as np


def drawn(module, *args, seed=0, **kwargs):
    """`module.init` with every leaf replaced by normal draws: nothing starts at zero, and scales are around one."""
    shapes = jax.eval_shape(lambda *args: module.init(jax.random.key(0), *args, **kwargs), *args)
    return like(shapes, seed)


def like(shapes, seed=0):
    """Normal draws of these shapes."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        fan_in = np.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 25
        noise = rng.standard_normal(leaf.shape) / np.sqrt(fan_in)
        return jnp.asarray(noise + (path[-1].key == "scale"), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def count(tree):
    """The number of elements in all leaves."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))
