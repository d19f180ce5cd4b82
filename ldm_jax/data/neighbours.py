"""A folder of pictures with the vectors of each one's nearest neighbours: what retrieval-augmented models read.

Blattmann et al. 2022, "Retrieval-Augmented Diffusion Models": a picture is drawn given the CLIP embeddings of the k
pictures that are most like it in a database. Here the database is the folder itself, and a picture is no neighbour of
its own. The search is exact, by cosine; its result is kept in an index, which `python -m ldm_jax.neighbours` writes:

    names    [n]    of the pictures, relative to their folder
    vectors  [n d]  float16, of length 1
    near     [n k]  the numbers of each one's neighbours, the nearest first
"""

import functools
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from ldm_jax.data import folder as folders
from ldm_jax.data.beside import Beside

FIELD = "neighbours"
AT_ONCE = 1024  # pictures whose neighbours are looked for at once


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
    names, vectors, near = read(index)
    if neighbours < 1 or neighbours > near.shape[1]:
        raise ValueError(
            f"{index} has {near.shape[1]} neighbours of each picture, not {neighbours}; write it anew with "
            f"--k {neighbours}"
        )
    number = {name: i for i, name in enumerate(names)}
    if absent := [name for name in of.files if name not in number]:
        raise ValueError(
            f"{index} lacks {len(absent)} of the {len(of)} pictures of {of.name}, the first is {absent[0]!r}; write it "
            f"anew: python -m ldm_jax.neighbours --images {path} --clip FOLDER --out {index}"
        )
    rows = near[[number[name] for name in of.files], :neighbours]
    digest = hashlib.sha256(of.fingerprint.encode())
    digest.update(vectors.tobytes() + np.ascontiguousarray(rows).tobytes())
    read_one = functools.partial(_vectors, vectors, rows)
    return Beside(of, f"{of.name} with neighbours", digest.hexdigest(), FIELD, read_one)


def _vectors(
    vectors: Float[np.ndarray, "n d"], near: Int[np.ndarray, "m k"], index: int
) -> Float[np.ndarray, "k d"]:
    return vectors[near[index]].astype(np.float32)


def nearest(
    vectors: Float[np.ndarray, "n d"], k: int, at_once: int = AT_ONCE
) -> Int[np.ndarray, "n {k}"]:
    """The k vectors that have the largest product with each, itself left out, the largest first.

    Raises:
      ValueError: fewer vectors than k + 1.
    """
    n = len(vectors)
    if not 1 <= k < n:
        raise ValueError(f"{k} neighbours of each of {n} pictures: give a number from 1 to {n - 1}")
    vectors, found = vectors.astype(np.float32), []
    for start in range(0, n, at_once):
        likeness = vectors[start : start + at_once] @ vectors.T
        own = np.arange(len(likeness))
        likeness[own, start + own] = -np.inf
        best = np.argpartition(-likeness, k - 1, axis=1)[:, :k]
        order = np.argsort(-np.take_along_axis(likeness, best, 1), axis=1, kind="stable")
        found.append(np.take_along_axis(best, order, 1))
    return np.concatenate(found).astype(np.int32)


def write(
    path: str | os.PathLike, names: Sequence[str], vectors: Float[np.ndarray, "n d"], k: int
) -> None:
    """An index of vectors, which become of length 1; the file appears at once or not at all."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = unit.astype(np.float16)
    half = Path(path).with_suffix(f".{os.getpid()}.npz")
    np.savez(half, names=np.array(names), vectors=unit, near=nearest(unit, k))
    os.replace(half, path)


def read(
    path: str | os.PathLike,
) -> tuple[list[str], Float[np.ndarray, "n d"], Int[np.ndarray, "n k"]]:
    """The names, vectors and neighbours of an index.

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
            return file["names"].tolist(), file["vectors"], file["near"]
    except (KeyError, ValueError, OSError) as error:
        raise ValueError(f"{path} is no index of neighbours ({error}); write it anew") from error
