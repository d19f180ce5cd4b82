"""Where each word of a prompt acts, as a method of `Pretrained`, which is `pipe` here."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from ldm_jax import heatmaps, media
from ldm_jax.pretrained import inputs, verbs
from ldm_jax.pretrained.inputs import Prompts
from ldm_jax.pretrained.verbs import Images


class Explained(NamedTuple):
    """Pictures, and for each what its positions take of each token of its prompt, see `heatmaps`."""

    images: Images
    maps: Float[np.ndarray, "b y x n"]
    words: list[heatmaps.Words]  # of each prompt, with the positions of their tokens

    def sheets(self) -> list[np.ndarray]:
        """A picture for each prompt: what was drawn, and each word's map over it."""
        every = zip(media.to_uint8(self.images), self.maps, self.words, strict=True)
        return [heatmaps.sheet(*one) for one in every]


def explain(
    pipe: Any,
    prompt: Prompts,
    negative_prompt: Prompts | None = None,
    *,
    steps: int = 50,
    guidance: float = 7.5,
    solver: str = "ddim",
    seed: int = 0,
    latents: Any = None,
    height: int | None = None,
    width: int | None = None,
    **sizes: Any,
) -> Explained:
    """Pictures as by `text_to_image`, and where each word of their prompts acts (Tang et al. 2023, DAAM).

    It costs one call of the network a step. Words are told by the first tokenizer, whose rows the others' follow.

    Raises:
      ValueError: as all `verbs`, and for prompts in several chunks or with weights.
    """
    inputs.only(pipe, "explain", 0)
    texts = inputs.check(prompt, solver)
    inputs.one_prompt(pipe, "explain", texts)
    if pipe.chunks != 1 or pipe.weighted:
        raise ValueError(
            "heat maps are of prompts of one chunk without weights; read them so: pipe.reading(chunks=1)"
        )
    words = told(pipe, texts)
    size, at = inputs.image_size(pipe, height, width), inputs.points(pipe, steps)
    start = inputs.start(pipe, latents, len(texts), seed, size)
    given = inputs.conditions(pipe, texts, negative_prompt, size, sizes)
    drawn = verbs.draw(pipe, start, at, *given, {}, solver, guidance, seed, maps=True)
    return Explained(*drawn, words)


def told(pipe: Any, texts: Sequence[str]) -> list[heatmaps.Words]:
    """Raises: ValueError: the model reads no text."""
    if not pipe.tokenizers:
        raise ValueError("heat maps show where words act, and this model reads no text")
    tokenizer = next(iter(pipe.tokenizers.values()))
    return [tokenizer.words(text) for text in texts]
