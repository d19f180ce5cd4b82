"""Where each word of a prompt acts: cross-attention, averaged over heads, layers and steps (Tang et al. 2023, DAAM).

The maps are read in a second pass over the states x_t of a sample, one call of the network a step on the condition
alone, so that solvers and guidance are as they are. The values at a position sum to one over all tokens of the prompt,
among them the marks of its begin and end.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt8

from ldm_jax import guided, media
from ldm_jax.diffusion.samplers import Point
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.nn import taps
from ldm_jax.types import Cond, Params

Words = Sequence[tuple[str, tuple[int, ...]]]  # and the positions of their tokens


def of_steps(
    model: LatentDiffusion,
    params: Params,
    cond: Cond,
    points: Point,
    way: Float[Array, "steps b *space c"],
) -> Float[Array, "b *space n"]:
    """The mean over the steps of what each position takes of each token, from the x_t at which the steps began.

    Raises:
      ValueError: a network without cross-attention, or a condition without tokens.
    """
    if cond.tokens is None:
        raise ValueError("there are no heat maps without tokens, and this condition has none")
    look = guided.looking(model, params, of_tokens=True)
    _, b, *space, _ = way.shape

    def body(total, inputs):
        x, t = inputs
        _, maps = look(x, jnp.broadcast_to(t, (b,)), cond)
        return total + taps.heat(maps, space), None

    zeros = jnp.zeros((b, *space, cond.tokens.shape[1]))
    total, _ = lax.scan(body, zeros, (way, points.t[:-1]))
    return total / len(way)


def check(model: LatentDiffusion, params: Params, shape: tuple[int, ...], batch: dict) -> None:
    """Raises: ValueError: the model has no cross-attention. Nothing is compiled or computed."""

    def look(params, batch):
        cond = model.condition(params, batch)
        way = jnp.zeros((1, len(next(iter(batch.values()))), *shape))
        return of_steps(model, params, cond, Point(*[jnp.ones(2)] * 3), way)

    jax.eval_shape(look, params, batch)


def of_words(
    maps: Float[np.ndarray, "*space n"], words: Words
) -> dict[str, Float[np.ndarray, "*space"]]:
    """The map of each word, the sum over its tokens; of a word that is there twice, over both."""
    found = {}
    for word, at in words:
        found[word] = found.get(word, 0.0) + maps[..., list(at)].sum(-1)
    return found


def sheet(
    image: UInt8[np.ndarray, "H W c"], maps: Float[np.ndarray, "h w n"], words: Words
) -> UInt8[np.ndarray, "height width 3"]:
    """The picture, and beside it over the darkened picture each word's map, between its least and greatest value."""
    size = image.shape[:2]
    tiles, names = [np.broadcast_to(image, (*size, 3))], [""]
    for word, heat in of_words(maps, words).items():
        heat = (heat - heat.min()) / max(float(np.ptp(heat)), 1e-12)
        tiles.append(media.overlay(image, np.asarray(jax.image.resize(heat, size, "linear"))))
        names.append(word)
    return media.grid(np.stack(tiles), columns=min(len(tiles), 8), captions=names)
