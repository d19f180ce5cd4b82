"""How often a class-conditional model trained on `shapes` draws its class, by rules and not by a network.

A class is a colour and a shape, "red cross". A picture counts when such an object is in it, whatever else there is: the
class of a picture with two objects is the one that its caption names first. Real pictures and their reconstructions by
the codec are judged by the same rules. What a model reaches that knows nothing of the classes is `accuracy_other`: its
samples, judged by each other's classes.
"""

from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8
from tqdm import tqdm

from ldm_jax import media
from ldm_jax.metrics import image, shape_reader
from ldm_jax.metrics.caption_reader import Claim, parse
from ldm_jax.pipeline import Pipeline
from ldm_jax.tasks import Sampling

SHOWN = 24  # samples on the sheet


def figures(
    pipeline: Pipeline,
    sampling: Sampling,
    real: Float[np.ndarray, "n h w 3"],
    labels: Sequence[str],
    seed: int,
    folder: Path,
) -> dict[str, float]:
    """The accuracies of samples under the labels of real pictures (in [-1, 1]), and of these; a sheet in `folder`.

    Raises:
      ValueError: classes that are no colour and shape.
    """
    claims = classes_of(labels)
    shapes = shape_reader.named(labels)
    rebuilt = np.clip(pipeline.reconstruct(real), -1.0, 1.0)
    images, seeds = [], [seed + i for i in range(len(labels))]
    with tqdm(total=len(labels), unit="sample") as bar:
        for drawn in pipeline.drawer(sampling)(pipeline.labels(labels), seeds):
            images.append(media.to_uint8(drawn.x))
            bar.update(len(drawn.x))
    images = np.concatenate(images)
    right = are_right(images, claims, shapes)
    marked = [
        f"{'right' if r else 'WRONG'}: {label}"
        for r, label in zip(right[:SHOWN], labels, strict=False)
    ]
    sheet = media.grid(images[:SHOWN], columns=6, captions=marked)
    media.save_png(folder / "evaluation_labels.png", sheet, {"labels": "validation"})
    return {
        "psnr": float(np.mean(image.psnr(jnp.asarray(real), jnp.asarray(rebuilt)))),
        "accuracy_real": np.mean(are_right(media.to_uint8(real), claims, shapes)),
        "accuracy_reconstructed": np.mean(are_right(media.to_uint8(rebuilt), claims, shapes)),
        "accuracy_other": np.mean(are_right(images, claims[1:] + claims[:1], shapes)),
        "accuracy": np.mean(right),
    }


def classes_of(labels: Sequence[str]) -> list[Claim]:
    """Raises: ValueError: classes that are no colour and shape."""
    claims = []
    for label in labels:
        said = parse(label).objects
        if len(said) != 1:
            raise ValueError(
                f"the class {label!r} names {len(said)} objects; classes of `shapes` are one"
            )
        claims.append(said[0])
    return claims


def are_right(
    images: UInt8[np.ndarray, "n h w 3"], claims: Sequence[Claim], shapes: Sequence[str]
) -> list[bool]:
    """Of each picture, whether its class is in it."""
    return [
        shape_reader.contains(picture, claim, shapes)
        for picture, claim in zip(images, claims, strict=True)
    ]
