"""One evaluation: everything that can be known beforehand is checked, then the networks run."""

from collections.abc import Callable
from typing import Any, NamedTuple

from ldm_jax.metrics import frechet, pyramid
from ldm_jax.quality import clip_score, extractors, features, perceptual, pictures, scores
from ldm_jax.quality.extractors import Extractor
from ldm_jax.quality.features import Kept
from ldm_jax.quality.pictures import Unusable
from ldm_jax.quality.subjects import Subject
from ldm_jax.training import sharding

__all__ = ["Asked", "Unusable", "prepare"]


class Asked(NamedTuple):
    """What is to be measured, and with what."""

    metrics: tuple[str, ...]
    features: str
    weights: tuple[str, ...]
    lpips: tuple[str, ...]  # files
    clip: str | None  # the folder of a CLIP model
    resize: str
    statistics: str | None  # a file of features of the reference
    save: str | None  # where to keep those of the reference
    subset: int  # of KID
    batch: int


def prepare(asked: Asked, subject: Subject) -> Callable[[], dict[str, Any]]:
    """The evaluation as a function that gives its figures; nothing was compiled yet.

    Raises:
      FileNotFoundError, ValueError: whatever of files, sizes or numbers of pictures does not fit; one sentence.
    """
    mesh = sharding.make_mesh()
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

    def judge() -> dict[str, Any]:
        figures: dict[str, Any] = {}

        def gather(of, parts):
            return features.gather(extractor, of, parts, mesh, asked.batch)

        if by_features or fits or scores.PATCHES in asked.metrics:
            generated = subject.generated()
        if paired or "rfid" in asked.metrics:
            rebuilt = subject.rebuilt()
        if by_features:
            reference = stored
            needed = scores.parts(by_features, reference=True)
            if needed and stored is None:
                reference = gather(subject.reference, needed)
            if asked.save:
                features.save(asked.save, extractor, reference)
            found = gather(generated, scores.parts(by_features))
            limits = scores.Limits(extractor, asked.subset)
            figures |= scores.of_features(by_features, reference, found, limits)
            figures["reference_pictures"] = reference.count if reference else 0
        if "rfid" in asked.metrics:
            pools = [gather(of, {"pool"}).pool for of in (subject.original, rebuilt)]
            figures["rfid"] = frechet.distance(*pools)
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
