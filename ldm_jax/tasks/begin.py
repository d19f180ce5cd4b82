"""What a trained model draws, one compiled program a task: from a text alone, from pictures, between two prompts.

A task changes where the walk from noise begins, what of given data stays, and which conditions are asked for
(`diffusion.editing` and its neighbours); the denoiser, its guidance and the one scan are the same in all of them.
Seeds, prompts, pictures, masks, strengths, guidance and the grid's values are traced; the task, the solver, the number
of steps and the shapes compile anew. Every sample has its own seed and does not depend on what is drawn beside it.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from ldm_jax import guided, heatmaps
from ldm_jax.diffusion import (
    diffedit,
    editing,
    inpainting,
    interpolation,
    inversion,
    process,
    samplers,
    windows,
)
from ldm_jax.diffusion.keeping import keeping
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.nn import prompt_to_prompt
from ldm_jax.types import Cond, Params

NAMES = (
    "text",
    "image_to_image",
    "inpaint",
    "outpaint",
    "edit",
    "prompt_to_prompt",
    "interpolate",
    "panorama",
)
FILM = 8  # frames of a film
MAPS = 10  # noises from which an edit finds its mask
PLAIN = guided.How()


class Drawn(NamedTuple):
    """Samples in [-1, 1], and on request or by their task what was seen on the way to them."""

    x: Float[Any, "n *space c"]
    film: Float[Any, "frames n *space c"] | None = None  # estimates of x0, oldest first
    maps: Float[Any, "n *latent tokens"] | None = None  # see `heatmaps`
    source: Float[Any, "n *space c"] | None = None  # what the source prompts drew
    mask: Float[Any, "n *space 1"] | None = None  # 1 where something new was made


@dataclass(frozen=True)
class Sampling:
    """How to sample; the solver is data of functions, the rest numbers."""

    solver: samplers.Solver
    points: samplers.Point  # the grid of noise levels
    guidance: float = 1.0  # the scale of classifier-free guidance; 1: none
    film: bool = False
    heatmaps: bool = False
    how: guided.How = PLAIN  # the kind of guidance ...
    numbers: Mapping[str, Any] = field(default_factory=dict)  # ... and its other options
    about: tuple[tuple[str, str], ...] = ()  # for the record: solver, steps, ...

    def traced(self) -> dict[str, Any]:
        """The numbers as arrays."""
        whole = ("zero_steps",)
        return {
            k: jax.tree.map(jnp.int32 if k in whole else jnp.float32, v)
            for k, v in self.numbers.items()
        }


@dataclass(frozen=True)
class Task:
    """A task and its inputs beside conditions and seeds.

    `rows` have one row a sample: "x", the given data [n *space c]; "mask" [n *space 1], 1 where something new is made;
    "source", the batch of the source prompts; "second", that of the prompts at the end of an interpolation, with
    "seed" and "share"; "align", "share" and "weigh" of `prompt_to_prompt.Exchange`. `numbers` are shared: "taken", the
    steps that a strength takes; "limit", see `diffedit.binarised`; "cross" and "own", the steps for which attention is
    the source's.
    """

    name: str = "text"
    rows: Mapping[str, Any] = field(default_factory=dict)
    numbers: Mapping[str, Any] = field(default_factory=dict)
    space: tuple[int, ...] | None = None  # of the latents, where it is not the model's
    repaint: tuple[int, int] | None = None  # jump and times, see `inpainting.repaint`


TEXT = Task()


def make_sampler(
    model: LatentDiffusion, shape: tuple[int, ...], sampling: Sampling, task: Task = TEXT
) -> Callable[..., Any]:
    """`(params, arrays, batch, keys, points, scale, numbers, negative, rows, shared) -> Drawn`, jitted.

    `shape` is that of a latent. The same function for every guidance scale but 1, every grid of as many steps, and all
    inputs of a task. `negative` is a batch whose conditions take the place of the null condition, or None; `rows` and
    `shared` are the task's.
    """
    leads = sampling.guidance != 1.0 and model.conditioner is not None
    shown = (sampling.film, sampling.heatmaps)
    size = (task.space or shape[:-1], task.repaint)
    return _sampler(model, shape, sampling.solver, leads, sampling.how, *shown, task.name, *size)


@functools.lru_cache(maxsize=16)
def _sampler(
    model: LatentDiffusion,
    shape: tuple[int, ...],
    solver: samplers.Solver,
    leads: bool,
    how: guided.How,
    film: bool,
    maps: bool,
    task: str,
    space: tuple[int, ...],
    repaint: tuple[int, int] | None,
) -> Callable[..., Any]:
    keep = (*["x0"] * film, *["x"] * maps)
    trained = shape[:-1]

    @jax.jit
    def draw(
        params,
        arrays,
        batch,
        keys,
        points,
        scale,
        numbers=None,
        negative=None,
        rows=None,
        shared=None,
    ):
        rows, shared, of, n = rows or {}, shared or {}, model, len(keys)
        if task == "prompt_to_prompt":
            batch, keys = _stacked(rows["source"], batch), _stacked(keys, keys)
            negative = negative and _stacked(negative, negative)
            of = model._replace(around=_exchanged(model, rows, shared, points))
        cond, null = model.condition(params, batch), None
        if leads:
            null = (
                model.null(params, batch) if negative is None else model.condition(params, negative)
            )
        denoise = guided.denoiser(of, how, params, null, scale, numbers or {}, points)
        if space != trained:
            denoise = windows.windows(denoise, trained, tuple(n // 4 for n in trained))
        noise, walk = jax.vmap(jax.random.split, out_axes=1)(keys)
        x_T = samplers.initial_noise(points, noise, (len(noise), *space, shape[-1]))
        begun, kept, seen = x_T, {}, {}
        if task == "interpolate":
            begun, cond = _between(model, params, points, x_T, cond, rows)
        if "x" in rows:
            eps = x_T / process.over(jnp.hypot(points.alpha[0], points.sigma[0]), x_T)
            known = _encoded(model, arrays, rows["x"], noise)
            levels = editing.cut(points, shared["taken"])
            if task == "edit":
                source = model.condition(params, rows["source"])
                begun, kept = _found(
                    model,
                    params,
                    denoise,
                    points,
                    shared,
                    known,
                    noise,
                    cond,
                    source,
                    rows,
                )
            else:
                begun = editing.noised(levels, known, eps)
            if task in ("inpaint", "outpaint"):
                small = editing.shrunk(rows["mask"], _factor(rows["x"], known))
                kept = dict(known=known, mask=small, eps=None if repaint else eps)
            points = inpainting.repaint(levels, *repaint) if repaint else levels
        walker = keeping(solver, **kept) if "x" in rows else solver
        z, way = samplers.sample(denoise, walker, points, begun, walk, cond, keep=keep)
        if kept:
            z = editing.composite(known, z, kept["mask"])
        x = model.codec.decode(arrays, z)
        if kept:
            hole = rows.get("mask")
            if hole is None:
                hole = _enlarged(kept["mask"], _factor(x, z))
            x = editing.composite(rows["x"], x, hole)
            seen["mask"] = hole
        if film:
            frames = np.unique(np.linspace(0, len(points.t) - 2, FILM).round().astype(int))
            seen["film"] = lax.map(lambda z: model.codec.decode(arrays, z), way[0][frames, -n:])
        if maps:
            cond, path = jax.tree.map(lambda a: a[-n:], (cond, way[-1].swapaxes(0, 1)))
            seen["maps"] = heatmaps.of_steps(model, params, cond, points, path.swapaxes(0, 1))
        if task == "prompt_to_prompt":
            seen["source"] = x[:n]
        return Drawn(x[-n:], **seen)

    return draw


def _stacked(first: Any, second: Any) -> Any:
    return jax.tree.map(lambda *both: jnp.concatenate(both), first, second)


def _factor(x: Array, z: Array) -> int:
    """How many positions of data one of latents stands for."""
    return x.shape[1] // z.shape[1]


def _enlarged(mask: Float[Array, "b *small 1"], factor: int) -> Float[Array, "b *space 1"]:
    for axis in range(1, mask.ndim - 1):
        mask = jnp.repeat(mask, factor, axis)
    return mask


def _encoded(model: LatentDiffusion, arrays: Params, x: Array, keys: Array) -> Array:
    """Latents, each by its own key, so that no sample depends on the others."""
    return jax.vmap(lambda x, key: model.codec.encode(arrays, x[None], key)[0])(x, keys)


def _exchanged(
    model: LatentDiffusion, rows: dict[str, Any], shared: dict[str, Any], points: samplers.Point
) -> Callable[..., Any]:
    """What changes the network for prompt-to-prompt, also where something else changes it already."""
    clock = model.target.c_time(model.path, points.t)

    def until(taken):
        """Half a step before the first of the steps that are the edited prompt's own."""
        middle = (clock[taken - 1] + clock[taken]) / 2
        return jnp.where(taken > 0, middle, jnp.inf)

    exchange = prompt_to_prompt.Exchange(
        *(rows[k] for k in ("align", "share", "weigh")),
        until(shared["cross"]),
        until(shared["own"]),
    )

    def around(network):
        network = model.around(network) if model.around else network
        return prompt_to_prompt.exchanging(network, exchange)

    return around


def _between(
    model: LatentDiffusion,
    params: Params,
    points: samplers.Point,
    x_T: Array,
    cond: Cond,
    rows: dict[str, Any],
) -> tuple[Array, Cond]:
    """Noise and condition of every frame; all rows of "second" are the same, and so are those of the first prompt."""
    keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed))[0])(rows["seed"])
    other = samplers.initial_noise(points, keys, x_T.shape)
    first, second = (
        jax.tree.map(lambda a: a[:1], c) for c in (cond, model.condition(params, rows["second"]))
    )
    frames = jax.vmap(interpolation.slerp)(x_T, other, rows["share"])
    return frames, interpolation.between(first, second, rows["share"])


def _found(
    model: LatentDiffusion,
    params: Params,
    denoise: Any,
    points: samplers.Point,
    shared: dict[str, Any],
    known: Array,
    keys: Array,
    cond: Cond,
    source: Cond,
    rows: dict[str, Any],
) -> tuple[Array, dict[str, Array]]:
    """Where DiffEdit begins, and what it keeps: the latents at all levels, and the mask, found if it is not given."""
    taken = shared["taken"]
    levels = editing.cut(points, taken)
    if "mask" in rows:
        mask = editing.shrunk(rows["mask"], _factor(rows["x"], known))
    else:
        halfway = samplers.Point(*(a[len(points.t) - 1 - (taken + 1) // 2] for a in points))
        contrast = diffedit.contrast(denoise, halfway, known, keys, cond, source, MAPS)
        mask = diffedit.binarised(contrast, shared["limit"])
    upwards = editing.resting(inversion.implicit())
    begun, way = inversion.invert(model.denoiser(params), levels, known, source, upwards)
    return begun, dict(known=known, mask=mask, way=way)
