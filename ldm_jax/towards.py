"""What guidance by gradients can lead to (`diffusion.gradients`): pictures that a network finds to be what a text says.

The network reads what the decoder makes of the estimate of the clean latents:

    CLIP, from a folder          log p = 100 cos(E_image(x), E_text(text)), its own scale (Radford et al. 2021)
    a classifier of `shapes`     log p = the sum of its log probabilities that each colour and shape that the text
                                 names is there, and each other one is not
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ldm_jax.models.shapes_classifier import ShapesClassifier
from ldm_jax.types import Params
from ldm_jax.weights import clip_model, prompts, shapes_classifier

# (params, what is wanted [b d], pictures in [-1, 1], t [b]) -> log p for each sample, up to a constant
LogP = Callable[[Params, Array, Float[Array, "b *space c"], Array], Float[Array, " b"]]


class Towards(NamedTuple):
    """A function of pictures with its parameters; the same `log_p` is the same compiled program."""

    log_p: LogP
    params: Params
    wanted: Callable[[Sequence[str]], Any]  # texts -> rows [b d] of what is wanted
    # Of the pictures that it was trained on; None: it reads any.
    size: tuple[int, int] | None = None


def load(path: str | Path) -> Towards:
    """CLIP, where the path is a folder, or the classifier that `ldm_jax.train_features` wrote there.

    Raises:
      FileNotFoundError, ValueError: there is neither, or it is damaged.
    """
    if not Path(path).exists():
        raise FileNotFoundError(
            f"there is no judge {path}; give a folder with a CLIP model, or a file of ldm_jax.train_features"
        )
    return clip(path) if Path(path).is_dir() else shapes(path)


def clip(folder: str | Path) -> Towards:
    """Pictures that fit a text as CLIP sees it.

    Raises:
      FileNotFoundError, ValueError: as `clip_model.load`.
    """
    vision, text, tokenizer = clip_model.load(folder)
    embed = jax.jit(functools.partial(clip_model.of_texts, text.network))

    def wanted(texts: Sequence[str]) -> Array:
        return embed(text.params, prompts.rows(tokenizer, list(texts)))

    return Towards(_by_clip(vision.network), vision.params, wanted)


def shapes(path: str | Path) -> Towards:
    """Pictures of `shapes` with the colours and shapes that a text names, and no others.

    Raises:
      FileNotFoundError, ValueError: as `shapes_classifier.load`; of `wanted`, a text that names none of them.
    """
    world, params = shapes_classifier.load(path)
    kinds = (*world.colours, *world.shapes)

    def wanted(texts: Sequence[str]) -> Float[np.ndarray, "b k"]:
        rows = np.array([[kind in text.split() for kind in kinds] for text in texts], np.float32)
        for text, row in zip(texts, rows, strict=True):
            if not row.any():
                raise ValueError(f"{text!r} names none of {kinds}, which this classifier knows")
        return rows

    size = (world.side, world.side)
    return Towards(_by_shapes(shapes_classifier.network(world)), params, wanted, size)


@functools.lru_cache(maxsize=8)
def _by_clip(network: Any) -> LogP:
    def log_p(params, wanted, x, t):
        return 100 * clip_model.cosine(clip_model.of_images(network, params, x), wanted)

    return log_p


@functools.lru_cache(maxsize=8)
def _by_shapes(network: ShapesClassifier) -> LogP:
    def log_p(params, wanted, x, t):
        said = network.apply(params, 127.5 * (x + 1)).present
        return jax.nn.log_sigmoid(jnp.where(wanted > 0, said, -said)).sum(-1)

    return log_p
