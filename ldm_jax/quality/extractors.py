"""Feature networks by name, with their weights, and the pictures that they take.

    inception          Inception-v3 with the published weights, 299 x 299 pixels by one of the ways of `resizing`
    shapes:FILE        the network that `python -m ldm_jax.train_features` has made; pictures as they are

The activations are computed in batches over the mesh, in one compiled program a size of picture.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import UInt8

from ldm_jax import tree
from ldm_jax.metrics import resizing
from ldm_jax.models import inception
from ldm_jax.models.inception import Activations
from ldm_jax.quality import pictures
from ldm_jax.quality.pictures import Pictures, bar_of
from ldm_jax.training import processes, sharding
from ldm_jax.types import Params
from ldm_jax.weights import features, shapes_classifier, table

THREADS = 8  # that decode


class Extractor(NamedTuple):
    """A feature network, ready to be asked."""

    name: str
    digest: str  # sha256 of its weights
    resize: str  # the way of resizing; "none"
    size: tuple[int, int] | None  # the only size of pictures that it takes; None: any
    dims: Activations  # the numbers of features
    prepare: Callable[[np.ndarray], np.ndarray]  # a picture, on the host
    activations: Callable[[Params, jax.Array], Activations]  # compiled
    variables: Params

    def check(self, image: UInt8[np.ndarray, "h w 3"], name: str) -> None:
        """Raises Unusable unless it takes pictures of this size."""
        if self.size is not None and image.shape[:2] != self.size:
            (h, w), (height, width) = self.size, image.shape[:2]
            raise pictures.Unusable(
                f"the features {self.name} are for pictures of {h} x {w} pixels, and those of {name} have "
                f"{height} x {width}; give --size {h}, or other features"
            )


def digest(variables: Params) -> str:
    """sha256 of names and values, whatever file they came from."""
    found = hashlib.sha256()
    for name, leaf in zip(tree.names(variables), jax.tree.leaves(variables), strict=True):
        found.update(name.encode() + np.asarray(leaf, np.float32).tobytes())
    return found.hexdigest()


def of_inception(weights: Sequence[str | Path], resize: str, mesh: Mesh) -> Extractor:
    """Inception-v3 with weights of its published files.

    Raises:
      FileNotFoundError, ValueError: no file was named, it is not there, cannot be read, or is of another network.
    """
    if not weights:
        raise ValueError(
            "the features inception need the weights of the FID network: download pt_inception-2015-12-05-6726825d.pth "
            "(releases of mseitzer/pytorch-fid on GitHub) and name it with --weights FILE"
        )
    network = inception.InceptionV3()
    example = jnp.zeros((1, inception.SIZE, inception.SIZE, 3))
    tensors = features.read(weights)
    shapes = jax.eval_shape(network.init, jax.random.key(0), example)
    try:
        variables = table.load(features.INCEPTION, shapes, tensors, features.INCEPTION_IGNORED)
    except table.Mismatch as error:
        raise ValueError(
            f"{', '.join(map(str, weights))} is not the FID Inception-v3 ({error}); take "
            "pt_inception-2015-12-05-6726825d.pth"
        ) from error
    prepare, resized = resizing.steps(resize, inception.SIZE)
    return _made(
        ("inception", resize, None),
        prepare,
        lambda variables, x: network.apply(variables, resized(x)),
        variables,
        mesh,
        example,
    )


def of_shapes(path: str | Path, mesh: Mesh) -> Extractor:
    """The feature network of `shapes` in a file.

    Raises:
      FileNotFoundError, ValueError: no such file, or one of something else.
    """
    world, variables = shapes_classifier.load(path)
    network = shapes_classifier.network(world)
    return _made(
        (f"shapes/{world.name}", "none", (world.side, world.side)),
        lambda image: image,
        lambda variables, x: network.apply(variables, x.astype(jnp.float32)).activations,
        variables,
        mesh,
        jnp.zeros((1, world.side, world.side, 3)),
    )


def named(name: str, weights: Sequence[str | Path], resize: str, mesh: Mesh) -> Extractor:
    """The feature network of a name; raises as the two above, and ValueError for another name."""
    kind, _, path = name.partition(":")
    if kind == "inception" and not path:
        return of_inception(weights, resize, mesh)
    if kind == "shapes":
        given = [path] if path else list(weights)
        if len(given) != 1:
            raise ValueError(
                "the features shapes need one file: --features shapes:FILE; make it with: "
                "python -m ldm_jax.train_features --data_dir DATA --out FILE.safetensors"
            )
        return of_shapes(given[0], mesh)
    raise ValueError(f"there are no features {name!r}; choose 'inception' or 'shapes:FILE'")


def _made(
    about: tuple[str, str, tuple[int, int] | None],
    prepare: Callable,
    apply: Callable,
    variables: Params,
    mesh: Mesh,
    example: jax.Array,
) -> Extractor:
    name, resize, size = about
    shapes: Any = jax.eval_shape(apply, variables, example)
    return Extractor(
        name,
        digest(variables),
        resize,
        size,
        Activations(*(shape.shape[1] for shape in shapes)),
        prepare,
        jax.jit(apply, out_shardings=sharding.replicated(mesh)),
        jax.device_put(variables, sharding.replicated(mesh)),
    )


def run(extractor: Extractor, of: Pictures, mesh: Mesh, batch: int) -> Iterator[Activations]:
    """The activations of all pictures of a set, batch by batch, as arrays of numpy, behind a progress bar.

    Of several processes each has all pictures, and gets all activations.

    Raises:
      Unusable: a picture that cannot be read, or of a size that does not fit.
    """
    size = sharding.round_up(min(batch, of.count), mesh)

    def prepared(i):
        image = of.read(i)
        extractor.check(image, of.name)
        return extractor.prepare(image)

    with (
        ThreadPoolExecutor(THREADS) as pool,
        bar_of(of.count, of.name) as bar,
    ):
        following = pool.map(prepared, range(min(size, of.count)))
        for start in range(0, of.count, size):
            rows = pictures.together(list(following), of.name)
            count, end = len(rows), min(start + 2 * size, of.count)
            following = pool.map(prepared, range(start + size, end))  # while the devices work
            full = rows[np.arange(size) % count]  # the last batch is filled up and cut
            found = extractor.activations(extractor.variables, sharding.spread(mesh, full))
            yield Activations(*(processes.fetch(field)[:count] for field in found))
            bar.update(count)
