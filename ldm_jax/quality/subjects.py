"""What is evaluated: pictures in folders, or those of a trained model beside the data that it was trained on."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ldm_jax import media
from ldm_jax.data import transforms
from ldm_jax.pipeline import Pipeline
from ldm_jax.quality import pictures
from ldm_jax.quality.pictures import Pictures
from ldm_jax.tasks import Sampling

Images = np.ndarray  # [n h w 3] in [-1, 1]


class Subject(NamedTuple):
    """The sets of pictures; those that a model has yet to make are made when they are called for.

    What makes them takes what the judge is given: nothing, or the arrays of a model that trains.
    """

    reference: Pictures | None
    example: Pictures  # has the size of the generated ones
    count: int  # of them
    original: Pictures | None  # of the pairs
    generated: Callable[..., Pictures]
    rebuilt: Callable[..., Pictures]
    captions: Callable[[], Sequence[str]] | None  # of the generated ones


def of_folders(images: Pictures, reference: Pictures | None) -> Subject:
    """A folder of pictures and another, which holds their originals where pairs are asked for."""
    original = reference and reference.first(images.count)
    captions = images.captions and (lambda: images.captions)
    made = (lambda: images,) * 2
    return Subject(reference, images, images.count, original, *made, captions)


def of_model(
    opened: Callable[..., Pipeline],
    sampling: Sampling,
    reference: Pictures | None,
    original: Pictures,
    conditions: Callable[[], Mapping[str, Any]],
    captions: Callable[[], Sequence[str]] | None,
    seed: int,
    size: int = 64,
) -> Subject:
    """Samples under the conditions of the originals, which are the reference unless another is given.

    `size` pictures are made at once.
    """
    n = original.count

    def samples(*given):
        draw = opened(*given).drawer(sampling, size)
        drawn = draw(conditions(), [seed + i for i in range(n)])
        return _made("samples", n, (part.x for part in drawn))

    rebuilt = _rebuilt(original, lambda *given: opened(*given).reconstruct, size)
    compared = original if reference is None else reference
    return Subject(compared, original, n, original, samples, rebuilt, captions)


def of_autoencoder(
    reconstruct: Callable[..., Callable[[Images, int], Images]], original: Pictures, size: int = 64
) -> Subject:
    """Reconstructions of the originals: `reconstruct(*given)` is a function of them and of how many at once."""

    def samples(*given):
        raise ValueError("an autoencoder draws no samples")

    rebuilt = _rebuilt(original, reconstruct, size)
    return Subject(original, original, original.count, original, samples, rebuilt, None)


def _rebuilt(
    original: Pictures, reconstruct: Callable[..., Callable[[Images, int], Images]], size: int
) -> Callable[..., Pictures]:
    n = original.count
    size = min(size, n)

    def reconstructions(*given):
        back = reconstruct(*given)
        parts = (
            back(transforms.to_unit(pictures.stacked(original, i, min(i + size, n))), size)
            for i in range(0, n, size)
        )
        return _made("reconstructions", n, parts)

    return reconstructions


def _made(name: str, n: int, parts: Iterable[np.ndarray]) -> Pictures:
    """Pictures of a model, kept in 8 bits."""
    made = []
    with pictures.bar_of(n, f"making {name}") as bar:
        for part in parts:
            made.append(media.to_uint8(part))
            bar.update(len(part))
    return pictures.of_array(name, np.concatenate(made))
