"""How often a text-to-image model trained on `shapes` draws what the prompt says, by rules and not by a network.

A prompt counts when exactly the objects that it names are there, with their shapes, colours and positions. The prompts
are captions of the validation split, and of the split of combinations that training never saw; a shape is the likeliest
of those that the captions of the validation split name, if it is likely enough. Real pictures and their reconstructions
by the codec are judged by the same rules, since they bound what a model can reach.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from ldm_jax import media
from ldm_jax.metrics import image, shape_reader
from ldm_jax.pipeline import Pipeline
from ldm_jax.tasks import Sampling

SHOWN = 24  # samples on the sheet of a split

Split = tuple[Float[np.ndarray, "n h w c"], Sequence[str]]  # pictures in [-1, 1] and their captions


def figures(
    pipeline: Pipeline,
    sampling: Sampling,
    splits: Mapping[str, Split],
    seed: int,
    folder: Path,
) -> dict[str, float]:
    """The accuracies of "seen", "unseen", real and reconstructed pictures; a sheet of samples a split in `folder`."""
    found = {}
    real, captions = splits["seen"]
    rebuilt = np.clip(pipeline.reconstruct(real), -1.0, 1.0)
    found["psnr"] = float(np.mean(image.psnr(real, rebuilt)))
    shapes = shape_reader.named(captions)
    for name, images in (("real", real), ("reconstructed", rebuilt)):
        accuracy = shape_reader.accuracy(media.to_uint8(images), captions, shapes)
        found[f"accuracy_{name}"] = accuracy
    draw = pipeline.drawer(sampling)
    for name, (_, captions) in splits.items():
        seeds = [seed + i for i in range(len(captions))]
        images = []
        with tqdm(total=len(captions), unit="sample", desc=name) as bar:
            for drawn in draw(pipeline.prompts(captions), seeds):
                images.append(media.to_uint8(drawn.x))
                bar.update(len(drawn.x))
        images = np.concatenate(images)
        found[f"accuracy_{name}"] = shape_reader.accuracy(images, captions, shapes)
        first = zip(images[:SHOWN], captions[:SHOWN], strict=True)
        right = [shape_reader.agrees(image, caption, shapes) for image, caption in first]
        marked = [
            f"{'right' if r else 'WRONG'}: {c}"
            for r, c in zip(right, captions[:SHOWN], strict=True)
        ]
        sheet = media.grid(images[:SHOWN], columns=6, captions=marked)
        media.save_png(folder / f"evaluation_{name}.png", sheet, {"prompts": name})
    return found | {"prompts": len(splits["seen"][1])}
