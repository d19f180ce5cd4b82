"""Where each task begins its walk, and on which grid, under which conditions and beside which data it goes on.

A function a task, from `Given` to `Start`; `denoiser` is what all of them walk with.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ldm_jax import guided
from ldm_jax.diffusion import (
    conditions,
    diffedit,
    editing,
    inpainting,
    interpolation,
    inversion,
    process,
    samplers,
    windows,
)
from ldm_jax.latent_diffusion import PICTURES, LatentDiffusion
from ldm_jax.nn import prompt_to_prompt
from ldm_jax.types import Batch, Cond, Denoiser, Params

MAPS = 10  # noises from which an edit finds its mask


@dataclass(frozen=True)
class Program:
    """All of which another value is another program."""

    model: LatentDiffusion
    shape: tuple[int, ...]  # of a latent
    solver: samplers.Solver
    leads: bool  # whether there is a null condition
    how: guided.How
    film: bool
    maps: bool
    task: str
    space: tuple[int, ...]
    repaint: tuple[int, int] | None
    combine: str | None


class Given(NamedTuple):
    """The values of a program, see `programs.make_sampler`."""

    params: Params
    arrays: Params
    batch: Batch
    keys: Array
    points: samplers.Point
    scale: Array
    numbers: dict[str, Any]
    negative: Batch | None
    rows: dict[str, Any]
    shared: dict[str, Any]


class Start(NamedTuple):
    """Where a walk begins, and what it needs on the way."""

    x: Array  # at the first level
    cond: Cond
    beside: guided.Beside  # the other conditions
    levels: samplers.Point  # the grid that is walked
    keys: Array  # of the walk's noise
    kept: dict[str, Any] | None = None  # see `keeping.keeping`; None: no data are given
    rest: Array | None = None  # what is added where the walk ends, see `inversion.Inverted`


def given(
    params: Params,
    arrays: Params,
    batch: Batch,
    keys: Array,
    points: samplers.Point,
    scale: Array,
    numbers: dict[str, Any] | None = None,
    negative: Batch | None = None,
    rows: dict[str, Any] | None = None,
    shared: dict[str, Any] | None = None,
) -> Given:
    """The values, of which the last may be left out."""
    rest = (numbers or {}, negative, rows or {}, shared or {})
    return Given(params, arrays, batch, keys, points, scale, *rest)


def start(of: Program, given: Given) -> Start:
    """Where the task begins."""
    if of.task == "prompt_to_prompt":  # the pairs are one batch
        source, batch, negative = given.rows["source"], given.batch, given.negative
        negative = negative and _stacked(negative, negative)
        keys = _stacked(given.keys, given.keys)
        given = given._replace(batch=_stacked(source, batch), keys=keys, negative=negative)
    noise, walk = jax.vmap(jax.random.split, out_axes=1)(given.keys)
    given = _with_pictures(of, given, noise)
    x_T = samplers.initial_noise(given.points, noise, (len(noise), *of.space, of.shape[-1]))
    cond = of.model.condition(given.params, given.batch)
    begun = Start(x_T, cond, _beside(of, given), given.points, walk)
    if of.combine == "BLEND":
        every = (cond, *_others(of, given))
        blended = conditions.blend(every, list(given.rows["weights"].T))
        begun = begun._replace(cond=blended)
    if of.task == "interpolate":
        return _between(of, given, begun)
    if "x" not in given.rows:
        return begun
    known = _encoded(of.model, given.arrays, given.rows["x"], noise)
    levels = editing.cut(given.points, given.shared["taken"])
    begun = begun._replace(levels=levels, kept={})
    if of.task == "edit":
        return _edited(of, given, begun, known, noise)
    if of.task == "invert":
        return begun._replace(x=_walked_up(of, given, levels, known)[0])
    if of.task == "edit_friendly":
        return _friendly(of, given, begun, known, noise)
    eps = x_T / process.over(jnp.hypot(given.points.alpha[0], given.points.sigma[0]), x_T)
    begun = begun._replace(x=editing.noised(levels, known, eps))
    if "mask" not in given.rows or "hole" in of.model.fields:
        return begun  # nothing is to stay, or the model sees by itself what is
    return _painted(of, given, begun, known, eps)


def _with_pictures(of: Program, given: Given, keys: Array) -> Given:
    """The values, in whose batches every condition has the pictures that the model reads."""
    fields = [field for field in PICTURES if field in of.model.fields]
    if not fields:
        return given
    batch = given.batch
    if "mask" in given.rows:
        batch = batch | {"x": given.rows["x"], "hole": given.rows["mask"]}

    def one(row, key):
        alone = jax.tree.map(lambda a: a[None], row)
        return jax.tree.map(lambda a: a[0], of.model.seen(given.arrays, alone, key))

    batch = jax.vmap(one)(batch, keys)
    shown = {field: batch[field] for field in fields}
    negative = given.negative and given.negative | shown
    rows = dict(given.rows)
    if "others" in rows:
        rows["others"] = tuple(other | shown for other in rows["others"])
    return given._replace(batch=batch, negative=negative, rows=rows)


def denoiser(of: Program, given: Given, begun: Start) -> Denoiser:
    """The model's denoiser with its guidance, in windows where the data are larger than the model's."""
    model = of.model
    if of.task == "prompt_to_prompt":
        model = model._replace(around=_exchanged(of, given))
    leads = (given.params, given.arrays, given.rows.get("towards"))
    beside = begun.beside._replace(log_p=guided.likelihood(model, of.how, *leads))
    numbers, points = given.numbers, given.points
    made = guided.denoiser(model, of.how, given.params, beside, given.scale, numbers, points)
    trained = of.shape[:-1]
    if of.space == trained or of.task == "semantic":
        return made  # a map says everywhere what is to be there: the network is run on the whole
    return windows.windows(made, trained, tuple(n // 4 for n in trained))


def _beside(of: Program, given: Given) -> guided.Beside:
    """The conditions that guidance leads away from, and those that it leads to beside the first."""
    null, weak, others, weights = None, None, (), None
    if of.leads:
        null = (
            of.model.null(given.params, given.batch)
            if given.negative is None
            else of.model.condition(given.params, given.negative)
        )
    if of.how.weak is not None:
        weak = of.how.weak.condition(given.params["weak"], given.batch)
    if of.combine == "AND":
        others, weights = _others(of, given), given.rows["weights"]
    return guided.Beside(null, weak, others, weights)


def _others(of: Program, given: Given) -> tuple[Cond, ...]:
    return tuple(of.model.condition(given.params, batch) for batch in given.rows["others"])


def _between(of: Program, given: Given, begun: Start) -> Start:
    """Noise and condition of every frame; all rows of "second" are the same, and so are those of the first prompt."""
    rows = given.rows
    keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed))[0])(rows["seed"])
    other = samplers.initial_noise(given.points, keys, begun.x.shape)
    second = of.model.condition(given.params, rows["second"])
    ends = (jax.tree.map(lambda a: a[:1], cond) for cond in (begun.cond, second))
    frames = jax.vmap(interpolation.slerp)(begun.x, other, rows["share"])
    return begun._replace(x=frames, cond=interpolation.between(*ends, rows["share"]))


def _painted(of: Program, given: Given, begun: Start, known: Array, eps: Array) -> Start:
    """The rest is put back after each step, and stretches of steps are repeated if that was asked for."""
    small = editing.shrunk(given.rows["mask"], factor(given.rows["x"], known))
    kept = dict(known=known, mask=small, eps=None if of.repaint else eps)
    levels = inpainting.repaint(begun.levels, *of.repaint) if of.repaint else begun.levels
    return begun._replace(levels=levels, kept=kept)


def _edited(of: Program, given: Given, begun: Start, known: Array, keys: Array) -> Start:
    """Where DiffEdit begins, and what it keeps: the latents at all levels, and the mask, found if it is not given."""
    taken, points = given.shared["taken"], given.points
    source = of.model.condition(given.params, given.rows["source"])
    if "mask" in given.rows:
        mask = editing.shrunk(given.rows["mask"], factor(given.rows["x"], known))
    else:
        halfway = samplers.Point(*(a[len(points.t) - 1 - (taken + 1) // 2] for a in points))
        both = (begun.cond, source)
        guides = denoiser(of, given, begun)
        contrast = diffedit.contrast(guides, halfway, known, keys, *both, MAPS)
        mask = diffedit.binarised(contrast, given.shared["limit"])
    x, way = _walked_up(of, given, begun.levels, known)
    return begun._replace(x=x, kept=dict(known=known, mask=mask, way=way))


def _friendly(of: Program, given: Given, begun: Start, known: Array, keys: Array) -> Start:
    """Where the edit-friendly inversion begins, and the noises of its walk, without guidance on the way up."""
    source = of.model.condition(given.params, given.rows["source"])
    plain, walk = of.model.denoiser(given.params), editing.resting(of.solver)
    found = inversion.edit_friendly(plain, walk, begun.levels, known, keys, source)
    return begun._replace(x=found.x_T, keys=found.noises, rest=found.rest)


def _walked_up(
    of: Program, given: Given, levels: samplers.Point, known: Array
) -> tuple[Array, Array]:
    """The noise that data come from under the source prompts, and the way there: DDIM inversion without guidance."""
    source = of.model.condition(given.params, given.rows["source"])
    plain, upwards = of.model.denoiser(given.params), editing.resting(inversion.implicit())
    return inversion.invert(plain, levels, known, source, upwards)


def _exchanged(of: Program, given: Given) -> Callable[..., Any]:
    """What changes the network for prompt-to-prompt, also where something else changes it already."""
    model, shared = of.model, given.shared
    clock = model.target.c_time(model.path, given.points.t)

    def until(taken):
        """Half a step before the first of the steps that are the edited prompt's own."""
        middle = (clock[taken - 1] + clock[taken]) / 2
        return jnp.where(taken > 0, middle, jnp.inf)

    exchange = prompt_to_prompt.Exchange(
        *(given.rows[k] for k in ("align", "share", "weigh")),
        until(shared["cross"]),
        until(shared["own"]),
    )

    def around(network):
        network = model.around(network) if model.around else network
        return prompt_to_prompt.exchanging(network, exchange)

    return around


def _stacked(first: Any, second: Any) -> Any:
    return jax.tree.map(lambda *both: jnp.concatenate(both), first, second)


def factor(x: Array, z: Array) -> int:
    """How many positions of data one of latents stands for."""
    return x.shape[1] // z.shape[1]


def enlarged(mask: Float[Array, "b *small 1"], factor: int) -> Float[Array, "b *space 1"]:
    """A mask of latents on the data's grid."""
    for axis in range(1, mask.ndim - 1):
        mask = jnp.repeat(mask, factor, axis)
    return mask


def _encoded(model: LatentDiffusion, arrays: Params, x: Array, keys: Array) -> Array:
    """Latents, each by its own key, so that no sample depends on the others."""
    return jax.vmap(lambda x, key: model.codec.encode(arrays, x[None], key)[0])(x, keys)
