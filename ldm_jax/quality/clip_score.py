"""The CLIP score: how well pictures fit their captions, as a CLIP model sees it.

    score = mean of 100 max(cos(E_image(x), E_text(caption)), 0)

(Hessel et al. 2021, eq. 1, with the factor 100 of torchmetrics instead of 2.5.) The model is a folder, see
`weights.clip_model`. Captions that are too long are cut. Numbers of different models do not compare.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from ldm_jax.data import transforms
from ldm_jax.quality import pictures
from ldm_jax.quality.pictures import Pictures
from ldm_jax.weights import clip_model, prompts

Judge = Callable[[Pictures, Sequence[str]], float]


def load(folder: str | Path | None, batch: int = 32) -> Judge:
    """The score by the model in a folder.

    Raises:
      FileNotFoundError, ValueError: no folder was named, files are missing, or are of another model.
    """
    vision, text, tokenizer = clip_model.load(named(folder))

    @jax.jit
    def cosines(of_text, of_image, x, ids):
        texts = clip_model.of_texts(text.network, of_text, ids)
        return clip_model.cosine(texts, clip_model.of_images(vision.network, of_image, x))

    def judge(of: Pictures, captions: Sequence[str]) -> float:
        found = []
        with tqdm(total=of.count, unit="picture", desc="CLIP score", mininterval=1.0) as bar:
            for start in range(0, of.count, batch):
                end = min(start + batch, of.count)
                x = jnp.asarray(transforms.to_unit(pictures.stacked(of, start, end)))
                rows = prompts.rows(tokenizer, list(captions[start:end]))
                found.append(np.asarray(cosines(text.params, vision.params, x, rows)))
                bar.update(end - start)
        return float(100 * np.concatenate(found).clip(0).mean())

    return judge


def named(folder: str | Path | None) -> str | Path:
    """The folder, after a look whether there is one: ValueError."""
    if folder is None:
        raise ValueError(
            "clip needs a CLIP model: download the folder of one, such as openai/clip-vit-base-patch16, and name it "
            "with --clip FOLDER"
        )
    return folder
