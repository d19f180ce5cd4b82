"""The file of a classifier of `shapes`, as `python -m ldm_jax.train_features` writes it.

Its header says which world it was trained on, so that it is not taken for another.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.data.shapes import vocabulary
from ldm_jax.data.shapes.vocabulary import World
from ldm_jax.models.shapes_classifier import ShapesClassifier
from ldm_jax.types import Params
from ldm_jax.weights import files

KIND = "ldm_jax shapes features"


def network(world: World) -> ShapesClassifier:
    return ShapesClassifier(
        pairs=len(world.pairs), kinds=len(world.colours) + len(world.shapes), most=world.most
    )


def save(path: str | Path, world: World, params: Params) -> None:
    tensors = {
        f"{layer}.{leaf}": np.asarray(array)
        for layer, leaves in params["params"].items()
        for leaf, array in leaves.items()
    }
    files.write(path, tensors, {"kind": KIND, "world": world.name})


def load(path: str | Path) -> tuple[World, Params]:
    """The world and the variables of a saved network.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a file of something else, or of another version of the network.
    """
    about = files.metadata(path)
    if about.get("kind") != KIND:
        raise ValueError(
            f"{path} holds no feature network of shapes; make one with: python -m ldm_jax.train_features "
            f"--data_dir DATA --out {path}"
        )
    world = vocabulary.world(about["world"])
    example = jnp.zeros((1, world.side, world.side, 3))
    shapes = jax.eval_shape(network(world).init, jax.random.key(0), example)["params"]
    tensors = files.read(path)
    wanted = {
        f"{layer}.{leaf}": shape.shape
        for layer, leaves in shapes.items()
        for leaf, shape in leaves.items()
    }
    if wanted != {name: tensor.shape for name, tensor in tensors.items()}:
        raise ValueError(
            f"{path} holds a feature network of shapes of another version; train it anew with: "
            f"python -m ldm_jax.train_features --data_dir DATA --out {path}"
        )
    return world, {
        "params": {
            layer: {leaf: jnp.asarray(tensors[f"{layer}.{leaf}"]) for leaf in leaves}
            for layer, leaves in shapes.items()
        }
    }
