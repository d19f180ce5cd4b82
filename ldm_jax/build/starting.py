"""Stage 2 from published weights: what a new run's parameters are at step 0, while all sections stay the config's own.

    start = dict(weights="dit", path="DiT-XL-2-256x256.pt")

takes the network and the classes from a file of DiT: one of its authors', `.pt` or `.safetensors`, or diffusers'. With
`fresh_classes` the table of classes is the config's, drawn anew: for data with other classes. A run that goes on needs
the file no more.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from ldm_jax.build.sections import checked, did_you_mean
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.models.dit import DiT
from ldm_jax.types import Params
from ldm_jax.weights import dit, files, pickles, table

SECTION = dict(weights=str, path=str, fresh_classes=bool)


def load(
    config: ConfigDict, of: LatentDiffusion, init: Callable[[jax.Array], Params]
) -> Callable[[Any], Params]:
    """What reads the parameters with given shardings; names and shapes are looked at before.

    Raises:
      FileNotFoundError, ValueError: no such file, weights of another network, or a model that is no DiT.
    """
    given = checked("start", config.start, SECTION, needed=("weights", "path"))
    if given["weights"] != "dit":
        raise ValueError(
            f"start.weights = {given['weights']!r} is unknown{did_you_mean(given['weights'], ['dit'])}; whole models "
            "are named by the section init"
        )
    if not isinstance(of.network, DiT):
        raise ValueError(
            f"start.weights = 'dit' is for the model dit.DiT, and config.model is {config.model.name}"
        )
    path = given["path"]
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"there is no file {path!r} with the weights of a DiT; say where it lies: --config.start.path=..."
        )
    tensors = files.read(path) if path.endswith(".safetensors") else pickles.read(path)
    key = jax.random.key(config.seed)
    shapes, ignore = jax.eval_shape(init, key), ()
    try:
        rows, tensors = dit.named(tensors)
        if given.get("fresh_classes"):
            ignore = (re.escape(dit.theirs(rows, "conditioner/embedding")),)
            shapes = {"network": shapes["network"]}
        table.check(rows, shapes, tensors, ignore)
    except table.Mismatch as error:
        raise ValueError(f"{path}: {error}") from error

    def read(layouts):
        wanted = {name: layouts[name] for name in shapes}
        placed = jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
            shapes,
            wanted,
        )
        found = table.load(rows, placed, tensors, ignore)
        if not ignore:
            return found
        fresh = jax.jit(lambda key: init(key)["conditioner"], out_shardings=layouts["conditioner"])
        return found | {"conditioner": fresh(key)}

    return read
