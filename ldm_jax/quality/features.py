"""What is kept of the features of a set of pictures, and how the reference's is stored.

A `.npz` file of numpy, without pickles: the features' moments, or all of them where a metric needs them, beside what
they are of: network, hash of its weights, way of resizing, size and number of pictures.
"""

import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from ldm_jax.metrics import moments
from ldm_jax.metrics.moments import Moments
from ldm_jax.quality import extractors
from ldm_jax.quality.extractors import Extractor
from ldm_jax.quality.pictures import Pictures

VERSION = "1"
ABOUT = ("version", "features", "digest", "resize", "size")
PARTS = ("pool", "spatial", "vectors", "logits")  # what can be kept


class Kept(NamedTuple):
    """The features of a set of pictures, in the parts that were asked for."""

    name: str
    count: int
    size: str  # of the first picture, as "32 x 32"
    pool: Moments | None = None
    spatial: Moments | None = None
    vectors: Float[np.ndarray, "n d"] | None = None
    logits: Float[np.ndarray, "n k"] | None = None


def gather(
    extractor: Extractor, of: Pictures, parts: Collection[str], mesh: Mesh, batch: int
) -> Kept:
    """Those parts of a set's features; moments are updated batch by batch."""
    size = size_of(of)
    pool, spatial = (moments.empty(dim) for dim in extractor.dims[:2])
    vectors, logits = [], []
    for found in extractors.run(extractor, of, mesh, batch):
        if "pool" in parts:
            pool = moments.update(pool, found.pool)
        if "spatial" in parts:
            spatial = moments.update(spatial, found.spatial)
        if "vectors" in parts:
            vectors.append(found.pool)
        if "logits" in parts:
            logits.append(found.logits)
    return Kept(
        of.name,
        of.count,
        size,
        pool if "pool" in parts else None,
        spatial if "spatial" in parts else None,
        np.concatenate(vectors) if vectors else None,
        np.concatenate(logits) if logits else None,
    )


def size_of(of: Pictures) -> str:
    """The size of the first picture."""
    height, width = of.read(0).shape[:2]
    return f"{height} x {width}"


def save(path: str | Path, extractor: Extractor, kept: Kept) -> None:
    """Writes the features of a reference; the file appears when it is whole."""
    values = (VERSION, extractor.name, extractor.digest, extractor.resize, kept.size)
    arrays = dict(zip(ABOUT, map(np.array, values), strict=True)) | {"count": np.array(kept.count)}
    for name in ("pool", "spatial"):
        if (of := getattr(kept, name)) is not None:
            arrays |= {f"{name}_mean": of.mean, f"{name}_scatter": of.scatter}
    if kept.vectors is not None:
        arrays["vectors"] = kept.vectors
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        np.savez(file, **arrays)
    part.replace(path)


def load(path: str | Path, extractor: Extractor, parts: Collection[str]) -> Kept:
    """The features of a reference that `save` has written.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: not such a file, features of another network, other weights or another way of resizing, or one that
        lacks a part.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; make one with --save_stats {path}")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no .npz file of arrays ({error}); make it anew") from error
    if not {*ABOUT, "count"} <= arrays.keys() or str(arrays["version"]) != VERSION:
        raise ValueError(
            f"{path} does not say which network its statistics are of, as those of --save_stats do; "
            "make it anew from the reference pictures"
        )
    about = {name: str(arrays[name]) for name in ABOUT}
    wanted = dict(features=extractor.name, digest=extractor.digest, resize=extractor.resize)
    for name, what in (("features", "features"), ("digest", "weights"), ("resize", "resizing")):
        if about[name] != wanted[name]:
            theirs, ours = about[name][:16], wanted[name][:16]
            raise ValueError(
                f"{path} has statistics of other {what} ({theirs} there, {ours} here); "
                "make it anew, or ask for the same"
            )
    count = int(arrays["count"])

    def moments_of(name):
        if f"{name}_mean" not in arrays:
            return None
        return Moments(count, arrays[f"{name}_mean"], arrays[f"{name}_scatter"])

    kept = Kept(
        str(path),
        count,
        about["size"],
        moments_of("pool"),
        moments_of("spatial"),
        arrays.get("vectors"),
    )
    lacking = [part for part in parts if getattr(kept, part) is None]
    if lacking:
        raise ValueError(
            f"{path} lacks what these metrics need ({', '.join(lacking)}); make it anew with the same --metrics"
        )
    return kept


def check_sizes(reference: Kept | Pictures, size: str) -> None:
    """Raises ValueError unless pictures of this size compare with the reference."""
    theirs = reference.size if isinstance(reference, Kept) else size_of(reference)
    if theirs != size:
        raise ValueError(
            f"the pictures have {size} pixels and those of {reference.name} {theirs}; "
            "bring both to one size with --size"
        )
