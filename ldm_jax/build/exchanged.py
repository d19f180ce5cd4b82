"""How the tokens of edited prompts belong to those of their sources, and how much each acts: rows of a task."""

from collections.abc import Mapping, Sequence

import numpy as np

from ldm_jax.build.sections import did_you_mean
from ldm_jax.nn.prompt_to_prompt import alignment
from ldm_jax.pipeline import Pipeline


def steps_of(name: str, share: float, steps: int) -> np.integer:
    """The steps that a share takes; ValueError if it is none."""
    if not 0 <= share <= 1:
        raise ValueError(f"{name}={share} must be in [0, 1]; it is a share of the steps")
    return np.int32(round(share * steps))


def rows(
    pipe: Pipeline,
    sources: dict[str, np.ndarray],
    edited: dict[str, np.ndarray],
    weigh: Sequence[Mapping[int, float]],
) -> dict[str, np.ndarray]:
    """How the tokens of the two prompts belong together, by the first tokenizer; `weigh` has factors by positions."""
    name = next(iter(pipe.texts))
    pairs = zip(np.asarray(sources[name]).tolist(), np.asarray(edited[name]).tolist(), strict=True)
    align, share = (np.stack(a) for a in zip(*(alignment(*pair) for pair in pairs), strict=True))
    factors = np.ones(share.shape, np.float32)
    for row, of in zip(factors, weigh, strict=True):
        for at, factor in of.items():
            row[at] = factor
    return dict(align=align, share=share, weigh=factors)


def weighed(
    pipe: Pipeline, prompts: Sequence[str], weights: Mapping[str, float]
) -> list[dict[int, float]]:
    """The factor of each token that belongs to a word with a weight, for each prompt.

    Raises:
      ValueError: a word that is in none of the prompts.
    """
    told = [pipe.words(prompt) for prompt in prompts]
    known = {word.lower() for words in told for word, _ in words}
    for word in weights:
        if word.lower() not in known:
            raise ValueError(
                f"the word {word!r} is in none of the prompts{did_you_mean(word.lower(), sorted(known))}"
            )
    factors = {word.lower(): factor for word, factor in weights.items()}
    return [
        {
            at: factors[word.lower()]
            for word, places in words
            if word.lower() in factors
            for at in places
        }
        for words in told
    ]
