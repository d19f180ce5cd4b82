"""One evaluation, or one at intervals: everything that can be known beforehand is checked, then the networks run."""

import functools
import hashlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from ldm_jax.metrics import frechet, pyramid
from ldm_jax.quality import clip_score, extractors, features, perceptual, pictures, scores
from ldm_jax.quality.extractors import Extractor
from ldm_jax.quality.features import Kept
from ldm_jax.quality.pictures import Pictures, Unusable
from ldm_jax.quality.subjects import Subject

__all__ = ["Asked", "Unusable", "prepare"]


class Asked(NamedTuple):
    """What is to be measured, and with what."""

    metrics: tuple[str, ...]
    features: str = "inception"
    weights: tuple[str, ...] = ()
    lpips: tuple[str, ...] = ()  # files
    clip: str | None = None  # the folder of a CLIP model
    resize: str = "tensorflow"
    statistics: str | None = None  # a file of features of the reference
    save: str | None = None  # where to keep those of the reference
    subset: int = 1000  # of KID
    batch: int = 64
    # A folder, in which features of real pictures are kept and found again.
    cache: Path | None = None


def prepare(asked: Asked, subject: Subject, mesh: Mesh) -> Callable[..., dict[str, Any]]:
    """The evaluation as a function that gives its figures; nothing was compiled yet.

    It may be called many times, with what the subject's functions take. What does not change is computed once.

    Raises:
      FileNotFoundError, ValueError: whatever of files, sizes or numbers of pictures does not fit; one sentence.
    """
    paired = [name for name in scores.PAIRS if name in asked.metrics]
    distance = perceptual.distance(asked.lpips) if "lpips" in paired else None
    for name in (*paired, *({scores.PATCHES} & set(asked.metrics))):
        if subject.reference is None:
            raise ValueError(f"{name} looks at pixels; give a folder of pictures as --reference")
    if paired:
        pictures.check_pairs(subject.original, subject.example)
    if scores.PATCHES in asked.metrics:
        pyramid.sides(*subject.reference.read(0).shape[:2])
    fits = None
    if "clip" in asked.metrics:
        if subject.captions is None:
            raise ValueError(
                f"clip compares pictures with captions, and {subject.example.name} has none"
            )
        fits = clip_score.load(asked.clip)
    by_features = [name for name in asked.metrics if name in scores.METRICS]
    extractor = stored = None
    if by_features or "rfid" in asked.metrics:
        extractor = extractors.named(asked.features, asked.weights, asked.resize, mesh)
        stored = _checked(asked, by_features, subject, extractor)
    if asked.save and not scores.parts(by_features, reference=True):
        raise ValueError(
            "--save_stats keeps features of the reference; ask for a metric of them, such as fid"
        )

    def gather(of, parts):
        return features.gather(extractor, of, parts, mesh, asked.batch)

    @functools.cache
    def reference() -> Kept | None:
        needed = scores.parts(by_features, reference=True)
        found = stored
        if needed and stored is None:
            found = _kept(extractor, subject.reference, needed, gather, asked.cache)
        if asked.save:
            features.save(asked.save, extractor, found)
        return found

    @functools.cache
    def originals() -> Kept:
        return _kept(extractor, subject.original, {"pool"}, gather, asked.cache)

    def judge(*given) -> dict[str, Any]:
        figures: dict[str, Any] = {}
        if by_features or fits or scores.PATCHES in asked.metrics:
            generated = subject.generated(*given)
        if paired or "rfid" in asked.metrics:
            rebuilt = subject.rebuilt(*given)
        if by_features:
            compared = reference()
            found = gather(generated, scores.parts(by_features))
            limits = scores.Limits(extractor, asked.subset)
            figures |= scores.of_features(by_features, compared, found, limits)
            figures["reference_pictures"] = compared.count if compared else 0
        if "rfid" in asked.metrics:
            figures["rfid"] = frechet.distance(originals().pool, gather(rebuilt, {"pool"}).pool)
        if scores.PATCHES in asked.metrics:
            figures |= scores.of_patches(subject.reference, generated)
        if paired:
            figures |= scores.of_pairs(paired, subject.original, rebuilt, distance)
        if fits:
            figures["clip"] = fits(generated, subject.captions())
        figures["pictures"] = subject.count
        if extractor is not None:
            figures |= dict(
                features=extractor.name, features_sha256=extractor.digest, resize=extractor.resize
            )
        return figures

    return judge


def _kept(
    extractor: Extractor,
    of: Pictures,
    parts: Collection[str],
    gather: Callable[[Pictures, Collection[str]], Kept],
    cache: Path | None,
) -> Kept:
    """The features of real pictures, after the first time from the folder `cache`, if it is known what they are."""
    if cache is None or not of.fingerprint:
        return gather(of, parts)
    said = (of.fingerprint, of.count, sorted(parts), extractor.digest, extractor.resize)
    path = cache / f"features_{hashlib.sha256(repr(said).encode()).hexdigest()[:16]}.npz"
    if path.is_file():
        return features.load(path, extractor, parts)
    found = gather(of, parts)
    features.save(path, extractor, found)
    return found


def _checked(
    asked: Asked, by_features: list[str], subject: Subject, extractor: Extractor
) -> Kept | None:
    """The stored features of the reference, if a file of them was named, after a look at sizes and numbers."""
    stored = None
    size = features.size_of(subject.example)
    extractor.check(subject.example.read(0), subject.example.name)
    if asked.statistics:
        stored = features.load(
            asked.statistics, extractor, scores.parts(by_features, reference=True)
        )
    if compared := stored or subject.reference:
        features.check_sizes(compared, size)
    counts = {"generated": subject.count}
    if compared:
        counts["reference"] = compared.count
    limits = scores.Limits(extractor, asked.subset)
    scores.check_counts(by_features, limits, **counts)
    if "rfid" in asked.metrics:
        scores.check_counts(["fid"], limits, original=subject.original.count)
    return stored
