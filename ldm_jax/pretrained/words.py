"""Edits by changing words of a prompt, as a method of `Pretrained`, which is `pipe` here: prompt-to-prompt."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion import solvers
from ldm_jax.nn.prompt_to_prompt import Exchange, alignment, positions
from ldm_jax.pretrained import inputs, verbs
from ldm_jax.pretrained.inputs import Prompts
from ldm_jax.pretrained.verbs import Images


def prompt_to_prompt(
    pipe: Any,
    source: Prompts,
    prompt: Prompts,
    negative_prompt: Prompts | None = None,
    *,
    weights: Mapping[str, float] | None = None,
    refine: bool = False,
    cross: float = 0.8,
    own: float = 0.4,
    steps: int = 50,
    guidance: float = 7.5,
    solver: str = "ddim",
    seed: int = 0,
    latents: Any = None,
    height: int | None = None,
    width: int | None = None,
    **sizes: Any,
) -> tuple[Images, Images]:
    """Pictures of the source prompts, and the same pictures as the edited prompts would have them.

    For the share `cross` of the steps words are read where the source's were, for the share `own` positions attend to
    each other as the source's did. Words that replace others take their places, unless `refine` is set.
    `weights` of words of the edited prompts, {word: factor}, make them act more or less, as long as `cross` lasts. See
    `nn.prompt_to_prompt`; arguments else are those of all `verbs`. To edit a given picture, give the `latents` of
    `invert`.

    Raises:
      ValueError: source and edited prompts of different number, a stochastic solver, shares outside of [0, 1], or a
        word that is not in the edited prompts.
    """
    inputs.only(pipe, "prompt_to_prompt", 0)
    sources, texts = (inputs.check(p, solver) for p in (source, prompt))
    inputs.one_prompt(pipe, "prompt_to_prompt", [*sources, *texts])
    n = len(texts)
    if len(sources) != n:
        raise ValueError(f"{len(sources)} source prompts and {n} prompts; give as many of both")
    if pipe.guide.how.name != "cfg" or pipe.guide.how.two_passes:
        raise ValueError(
            "prompt_to_prompt needs the guidance cfg in one batch; draw without guiding"
        )
    if solvers.TABLE[solver].stochastic:
        raise ValueError(f"the solver {solver!r} adds noise and pairs need the same; use ddim")
    for name, share in (("cross", cross), ("own", own)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name}={share} must be in [0, 1]; it is a share of the steps")
    size, at = inputs.image_size(pipe, height, width), inputs.points(pipe, steps)
    clock = np.asarray(at.t)[:-1] * (pipe.model.path.steps - 1)

    negative = None if negative_prompt is None else inputs.several(negative_prompt)
    if negative is not None:
        negative = negative * n if len(negative) == 1 else negative
        inputs.same_number(texts, negative, "negative prompts")
        negative = negative * 2
    given = inputs.conditions(pipe, [*sources, *texts], negative, size, sizes)

    def until(share):
        taken = round(share * steps)
        return jnp.float32(clock[taken - 1] - 0.5 if taken else np.inf)

    maps = [*map(jnp.asarray, _maps(pipe, sources, texts, weights or {}, refine))]
    side = max(pipe.components["unet"].config.get("sample_size", 64) // 4, 1)
    exchange = Exchange(*maps, until(cross), until(own), self_size=side**2)
    start = inputs.start(pipe, latents, n, seed, size)
    both = jnp.concatenate([start, start])
    kept = {"exchange": exchange}
    drawn = verbs.draw(pipe, both, at, *given, {}, solver, guidance, seed, kept=kept)
    return drawn[:n], drawn[n:]


def _maps(
    pipe: Any,
    sources: Sequence[str],
    texts: Sequence[str],
    weights: Mapping[str, float],
    refine: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`align`, `share` and `weigh` of `Exchange`, by the first tokenizer, whose rows the others' follow."""
    tokenizer = next(iter(pipe.tokenizers.values()))
    rows = tokenizer([*sources, *texts], pipe.chunks).tolist()
    pairs = list(zip(rows[: len(texts)], rows[len(texts) :], strict=True))
    align, share = (np.stack(a) for a in zip(*(alignment(*p, refine) for p in pairs), strict=True))
    weigh = np.ones(share.shape, np.float32)
    for word, factor in weights.items():
        row = tokenizer([word], 1)[0].tolist()
        ids = row[1 : row.index(tokenizer.end)]
        if not any(set(ids) <= set(edited) for _, edited in pairs):
            raise ValueError(f"the word {word!r} is in none of the prompts {list(texts)}")
        for i, (_, edited) in enumerate(pairs):
            if set(ids) <= set(edited):
                weigh[i, positions(edited, ids)] *= factor
    return align, share, weigh
