"""Pictures with the vectors of each one's nearest neighbours: what retrieval-augmented models read.

Blattmann et al. 2022, "Retrieval-Augmented Diffusion Models": a picture is drawn given the CLIP embeddings of the k
pictures that are most like it in a database. Here the database is the folder itself, or a split of a prepared data set,
and a picture is no neighbour of its own. The search is exact, by cosine; its result is kept in an index, which
`python -m ldm_jax.neighbours` writes:

    names    [n]    of the pictures: relative to their folder, or "train/7"
    vectors  [n d]  float16, of length 1
    near     [n k]  the numbers of each one's neighbours, the nearest first
    database        how many pictures, from the first one on, can be neighbours; the others are looked up among them
    network         what made the vectors
"""

import functools
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from ldm_jax.data import folder as folders
from ldm_jax.data import tfds_source
from ldm_jax.data.beside import Beside
from ldm_jax.data.records import Source

FIELD = "neighbours"
AT_ONCE = 1024  # pictures whose neighbours are looked for at once


class Index(NamedTuple):
    """What a file of neighbours holds; see the module."""

    names: list[str]
    vectors: Float[np.ndarray, "n d"]
    near: Int[np.ndarray, "n k"]
    database: int
    network: str


def folder(
    path: str | os.PathLike,
    index: str | os.PathLike,
    *,
    neighbours: int = 20,
    split: str = "all",
    holdout: float = 0.05,
    convention: str = "none",
) -> Beside:
    """The pictures below `path`, as `folder.folder` has them, with neighbours by an index of that folder.

    Records also have `neighbours`, float32 [k d]: of the whole folder, of whatever split.

    Raises:
      FileNotFoundError: no such folder or index.
      ValueError: an index that lacks a picture, or has fewer neighbours of each; see `folder.folder`, too.
    """
    of = folders.folder(path, split=split, holdout=holdout, convention=convention)
    made = f"--images {path} --clip FOLDER"
    return _beside(of, of.files, index, neighbours, made, functools.partial(_file, of.root))


def tfds(
    dataset: str,
    data_dir: str | os.PathLike,
    index: str | os.PathLike,
    *,
    split: str = "train",
    neighbours: int = 20,
    image: str = "image",
    caption: str | None = None,
    label: str | None = None,
) -> Beside:
    """A prepared data set, as `tfds_source.tfds` has it, with neighbours by an index of its splits.

    Records also have `neighbours`, float32 [k d].

    Raises:
      FileNotFoundError: the data set is not prepared, or there is no such index.
      ValueError: an index that lacks a record, or has fewer neighbours of each; see `tfds_source.tfds`, too.
    """
    options = dict(image=image, caption=caption, label=label)
    of = tfds_source.tfds(dataset, data_dir, split, **options)
    made = f"--dataset {dataset} --data_dir {data_dir} --features shapes:FILE"
    one = functools.partial(_record, dataset, str(data_dir), image)
    return _beside(of, tfds_source.names(of), index, neighbours, made, one)


def _beside(
    of: Source,
    names: Sequence[str],
    path: str | os.PathLike,
    neighbours: int,
    made: str,
    one: Callable[[str], bytes],
) -> Beside:
    """`made` are the flags by which an index is made, and `one` reads a picture of a name."""
    index = read(path)
    if neighbours < 1 or neighbours > index.near.shape[1]:
        raise ValueError(
            f"{path} has {index.near.shape[1]} neighbours of each picture, not {neighbours}; write it anew with "
            f"--k {neighbours}"
        )
    number = {name: i for i, name in enumerate(index.names)}
    if absent := [name for name in names if name not in number]:
        raise ValueError(
            f"{path} lacks {len(absent)} of the {len(of)} pictures of {of.name}, the first is {absent[0]!r}; write it "
            f"anew: python -m ldm_jax.neighbours {made} --out {path}"
        )
    rows = index.near[[number[name] for name in names], :neighbours]
    digest = hashlib.sha256(of.fingerprint.encode())
    digest.update(index.vectors.tobytes() + np.ascontiguousarray(rows).tobytes())
    return Beside(
        of,
        f"{of.name} with neighbours",
        digest.hexdigest(),
        FIELD,
        functools.partial(_vectors, index.vectors, rows),
        functools.partial(_pictures, tuple(index.names), rows, one),
    )


def _vectors(
    vectors: Float[np.ndarray, "n d"], near: Int[np.ndarray, "m k"], index: int
) -> Float[np.ndarray, "k d"]:
    return vectors[near[index]].astype(np.float32)


def _pictures(
    names: Sequence[str], near: Int[np.ndarray, "m k"], one: Callable[[str], bytes], index: int
) -> list[bytes]:
    return [one(names[i]) for i in near[index]]


def _file(root: str, name: str) -> bytes:
    return Path(root, name).read_bytes()


def _record(dataset: str, data_dir: str, image: str, name: str) -> bytes:
    split, _, number = name.rpartition("/")
    return _images(dataset, data_dir, image, split)[int(number)]["image"]


@functools.lru_cache(maxsize=8)
def _images(dataset: str, data_dir: str, image: str, split: str) -> Source:
    return tfds_source.tfds(dataset, data_dir, split, image=image).only(("image",))


def nearest(
    vectors: Float[np.ndarray, "n d"],
    k: int,
    database: int | None = None,
    at_once: int = AT_ONCE,
) -> Int[np.ndarray, "n {k}"]:
    """The k vectors of the database that have the largest product with each, itself left out, the largest first.

    The database are the first vectors, as many as `database` says; None: all.

    Raises:
      ValueError: fewer vectors than k + 1 in the database.
    """
    known = len(vectors) if database is None else database
    if not 1 <= k < known:
        raise ValueError(f"{k} neighbours of {known} pictures: give a number from 1 to {known - 1}")
    vectors, found = vectors.astype(np.float32), []
    for start in range(0, len(vectors), at_once):
        likeness = vectors[start : start + at_once] @ vectors[:known].T
        own = np.arange(start, min(start + at_once, known))  # none beyond the database
        likeness[own - start, own] = -np.inf
        found.append(largest(likeness, k))
    return np.concatenate(found)


def largest(likeness: Float[np.ndarray, "n m"], k: int) -> Int[np.ndarray, "n {k}"]:
    """The columns of the k largest numbers in each row, the largest first."""
    best = np.argpartition(-likeness, k - 1, axis=1)[:, :k]
    order = np.argsort(-np.take_along_axis(likeness, best, 1), axis=1, kind="stable")
    return np.take_along_axis(best, order, 1).astype(np.int32)


def unit(vectors: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """The vectors with length 1."""
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def look_up(of: Index, vectors: Float[np.ndarray, "n d"], k: int) -> Float[np.ndarray, "n {k} d"]:
    """The vectors of the k pictures of the database that are nearest to each of `vectors`, the nearest first.

    Raises:
      ValueError: vectors of another length, or fewer pictures.
    """
    known = of.vectors[: of.database].astype(np.float32)
    if vectors.shape[1] != known.shape[1]:
        raise ValueError(
            f"the index has vectors of {known.shape[1]} numbers, and these pictures have {vectors.shape[1]}; "
            "take the network that it was made with"
        )
    if k > len(known):
        raise ValueError(f"the index has {len(known)} pictures, and {k} neighbours are asked for")
    return known[largest(unit(vectors) @ known.T, k)]


def write(
    path: str | os.PathLike,
    names: Sequence[str],
    vectors: Float[np.ndarray, "n d"],
    k: int,
    database: int | None = None,
    network: str = "",
) -> None:
    """An index of vectors, which become of length 1; the file appears at once or not at all."""
    known, rows = len(vectors) if database is None else database, unit(vectors).astype(np.float16)
    arrays = dict(vectors=rows, near=nearest(rows, k, known))
    arrays |= dict(names=np.array(names), database=np.array(known), network=np.array(network))
    half = Path(path).with_suffix(f".{os.getpid()}.npz")
    half.parent.mkdir(parents=True, exist_ok=True)
    np.savez(half, **arrays)
    os.replace(half, path)


def read(path: str | os.PathLike) -> Index:
    """An index.

    Raises:
      FileNotFoundError: there is none.
      ValueError: a file of something else.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"there is no index {str(path)!r}; write it: python -m ldm_jax.neighbours --images DIR --clip FOLDER "
            f"--out {path}"
        )
    try:
        with np.load(path, allow_pickle=False) as file:
            names, database, network = (file[k].tolist() for k in ("names", "database", "network"))
            return Index(names, file["vectors"], file["near"], database, network)
    except (KeyError, ValueError, OSError) as error:
        raise ValueError(f"{path} is no index of neighbours ({error}); write it anew") from error
