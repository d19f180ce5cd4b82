"""From sets of pictures to figures, by the names of metrics.

Sets are compared by their features (fid, sfid, kid, prdc), judged alone (is), or compared by their patches (swd); pairs
are compared picture by picture (psnr, ssim, lpips). What a metric cannot do with so few pictures is said before any
network runs.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import UInt8

from ldm_jax.data import transforms
from ldm_jax.metrics import (
    frechet,
    image,
    inception_score,
    kernel_distance,
    neighbours,
    pyramid,
)
from ldm_jax.quality import pictures
from ldm_jax.quality.extractors import Extractor
from ldm_jax.quality.features import Kept
from ldm_jax.quality.pictures import Pictures

SPLITS = 10  # of the Inception Score


class Limits(NamedTuple):
    """What decides how many pictures are needed."""

    extractor: Extractor
    subset: int  # of KID


class Metric(NamedTuple):
    """A metric of sets by their features."""

    gives: tuple[str, ...]  # the names of its figures
    part: str  # of the features that it needs
    alone: bool  # it looks at the generated pictures only
    least: Callable[[Limits], int]  # pictures
    why: str
    measure: Callable[[Kept | None, Kept, Limits], dict[str, float]]  # of reference and generated


def _kid(reference: Kept, generated: Kept, limits: Limits) -> dict[str, float]:
    of = kernel_distance.distance(reference.vectors, generated.vectors, limits.subset)
    return {"kid": of.mean, "kid_std": of.std}


def _is(_: Kept | None, generated: Kept, limits: Limits) -> dict[str, float]:
    of = inception_score.score(generated.logits, SPLITS)
    return {"is": of.mean, "is_std": of.std}


METRICS = {
    "fid": Metric(
        ("fid",),
        "pool",
        False,
        lambda limits: limits.extractor.dims.pool + 1,
        "one more than there are features, for a covariance of full rank",
        lambda a, b, _: {"fid": frechet.distance(a.pool, b.pool)},
    ),
    "sfid": Metric(
        ("sfid",),
        "spatial",
        False,
        lambda limits: limits.extractor.dims.spatial + 1,
        "one more than there are features, for a covariance of full rank",
        lambda a, b, _: {"sfid": frechet.distance(a.spatial, b.spatial)},
    ),
    "kid": Metric(
        ("kid", "kid_std"),
        "vectors",
        False,
        lambda limits: limits.subset,
        "as many as kid_subset says",
        _kid,
    ),
    "is": Metric(
        ("is", "is_std"), "logits", True, lambda _: SPLITS, "one for each of its parts", _is
    ),
    "prdc": Metric(
        neighbours.Neighbours._fields,
        "vectors",
        False,
        lambda _: neighbours.DENSE + 1,
        "one more than it looks at neighbours",
        lambda a, b, _: neighbours.measure(a.vectors, b.vectors)._asdict(),
    ),
}
PAIRS = ("psnr", "ssim", "lpips")
PATCHES = "swd"


def figures_of(names: Collection[str]) -> list[str]:
    """How the figures of metrics are called; those of single levels of the pyramid are left out."""
    return [figure for n in names for figure in (METRICS[n].gives if n in METRICS else (n,))]


def parts(names: Collection[str], reference: bool = False) -> set[str]:
    """The parts of the features that metrics need, of the reference or of the generated pictures."""
    chosen = (METRICS[name] for name in names if name in METRICS)
    return {metric.part for metric in chosen if not (reference and metric.alone)}


def check_counts(names: Collection[str], limits: Limits, **counts: int) -> None:
    """Raises ValueError if a metric needs more pictures than there are; `counts` of what is counted."""
    for name in names:
        metric = METRICS.get(name)
        for of, count in counts.items() if metric else ():
            least = metric.least(limits)
            if count < least and not (metric.alone and of == "reference"):
                raise ValueError(
                    f"{name} with the features {limits.extractor.name} needs {least} {of} pictures ({metric.why}), "
                    f"and there are {count}; give more, or leave {name} out"
                )


def of_features(
    names: Collection[str], reference: Kept | None, generated: Kept, limits: Limits
) -> dict[str, float]:
    """The figures of those metrics that look at features."""
    figures = {}
    for name in names:
        if name in METRICS:
            figures |= METRICS[name].measure(reference, generated, limits)
    return figures


def of_patches(reference: Pictures, generated: Pictures) -> dict[str, float]:
    """The Laplacian-pyramid score, level by level and as their mean; of the larger set the first pictures."""
    n = min(reference.count, generated.count)
    sets = [pictures.stacked(of, 0, n) for of in (reference, generated)]
    found = pyramid.distances(*sets)
    return {"swd": float(np.mean(list(found.values())))} | {
        f"swd_{side}": value for side, value in found.items()
    }


def of_pairs(
    names: Collection[str],
    reference: Pictures,
    generated: Pictures,
    distance: Callable | None,
    batch: int = 16,
) -> dict[str, float]:
    """The means of PSNR (dB), SSIM and LPIPS over the pairs; `distance` is LPIPS.

    Raises:
      Unusable: pictures of different sizes.
    """
    measures: Mapping[str, Callable] = {"psnr": image.psnr, "ssim": image.ssim, "lpips": distance}
    measures = {name: jax.jit(measures[name]) for name in PAIRS if name in names}
    found: dict[str, list[np.ndarray]] = {name: [] for name in measures}
    for start in range(0, reference.count, batch):
        end = min(start + batch, reference.count)
        both: Sequence[UInt8[np.ndarray, "n h w 3"]] = [
            pictures.stacked(of, start, end) for of in (reference, generated)
        ]
        if both[0].shape != both[1].shape:
            raise pictures.Unusable(
                f"the pictures of {generated.name} and their originals in {reference.name} differ in size; "
                "--size brings all to one"
            )
        x, y = map(transforms.to_unit, both)
        for name, measure in measures.items():
            found[name].append(np.asarray(measure(x, y)))
    return {name: float(np.concatenate(values).mean()) for name, values in found.items()}
