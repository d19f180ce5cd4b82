"""What is compiled: a task as one program, or as three of which the host calls the middle one for each step.

The second way exists to show progress. A callback out of the one scan would keep its program out of the compile cache,
so `sample.py` walks by itself instead: the programs are cached, compile in the time of the one, know no number of steps
beyond the shape of the grid, and give the same.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ldm_jax import heatmaps
from ldm_jax.diffusion import editing, samplers
from ldm_jax.diffusion.keeping import keeping
from ldm_jax.latent_diffusion import LatentDiffusion, torus
from ldm_jax.tasks import begin
from ldm_jax.tasks.asked import TEXT, Drawn, Sampling, Task
from ldm_jax.tasks.begin import Given, Program, Start

FILM = 8  # frames of a film


class Stepwise(NamedTuple):
    """`start(*given) -> (start, way)`, `step(given, start, way, i) -> way`, `finish(given, start, way) -> Drawn`.

    All jitted; `given` is what `make_sampler`'s function takes.
    """

    start: Callable[..., Any]
    step: Callable[..., Any]
    finish: Callable[..., Any]


def make_sampler(
    model: LatentDiffusion, shape: tuple[int, ...], sampling: Sampling, task: Task = TEXT
) -> Callable[..., Drawn]:
    """`(params, arrays, batch, keys, points, scale, numbers, negative, rows, shared) -> Drawn`, jitted.

    `shape` is that of a latent. The same function for every guidance scale but 1, every grid of as many steps, and all
    inputs of a task. `negative` is a batch whose conditions take the place of the null condition, or None; `rows` and
    `shared` are the task's.
    """
    return _sampler(_program(model, shape, sampling, task))


def make_stepwise(
    model: LatentDiffusion, shape: tuple[int, ...], sampling: Sampling, task: Task = TEXT
) -> Stepwise:
    """The same in three programs, of which `step` is one step of the walk."""
    return _stepwise(_program(model, shape, sampling, task))


def _program(
    model: LatentDiffusion, shape: tuple[int, ...], sampling: Sampling, task: Task
) -> Program:
    leads = (sampling.guidance != 1.0 or task.combine == "AND") and sampling.how.name != "auto"
    return Program(
        model=torus(model) if task.name == "seamless" else model,
        shape=shape,
        solver=sampling.solver,
        leads=leads and model.conditioner is not None,
        how=sampling.how,
        film=sampling.film,
        maps=sampling.heatmaps,
        task=task.name,
        space=task.space or shape[:-1],
        repaint=task.repaint,
        combine=task.combine,
    )


@functools.lru_cache(maxsize=16)
def _sampler(of: Program) -> Callable[..., Drawn]:
    @jax.jit
    def draw(*args):
        given = begin.given(*args)
        start = begin.start(of, given)
        walk = (begin.denoiser(of, given, start), _walker(of, start), start.levels)
        z, way = samplers.sample(*walk, start.x, start.keys, start.cond, keep=_keep(of))
        return _finish(of, given, start, z, way)

    return draw


@functools.lru_cache(maxsize=16)
def _stepwise(of: Program) -> Stepwise:
    @jax.jit
    def start(*args):
        begun = begin.start(of, begin.given(*args))
        carry = samplers.begun(_walker(of, begun), begun.levels, begun.x)
        steps = len(begun.levels.t) - 1
        kept = {name: jnp.zeros((steps, *carry[0].shape), carry[0].dtype) for name in _keep(of)}
        return begun, (carry, kept)

    @jax.jit
    def step(args, begun, way, i):
        given, (carry, kept) = begin.given(*args), way
        walk = (begin.denoiser(of, given, begun), _walker(of, begun), begun.levels)
        carry, new = samplers.stepping(*walk, begun.keys, begun.cond, keep=_keep(of))(carry, i)
        pairs = zip(_keep(of), new, strict=True)
        return carry, {
            name: lax.dynamic_update_index_in_dim(kept[name], a, i, 0) for name, a in pairs
        }

    @jax.jit
    def finish(args, begun, way):
        (z, _), kept = way
        return _finish(of, begin.given(*args), begun, z, tuple(kept[name] for name in _keep(of)))

    return Stepwise(start, step, finish)


def walked(programs: Stepwise, given: tuple[Any, ...], tick: Callable[[int, int], Any]) -> Drawn:
    """Draws step by step; `tick(done, steps)` is called when a step is done, while the next one runs already."""
    begun, way = programs.start(*given)
    steps, before = len(begun.levels.t) - 1, None
    layouts = jax.tree.map(lambda a: a.sharding, way)
    way = jax.device_put(way, layouts)
    for i in range(steps):
        # Each step is given arrays that lie alike, whatever XLA made of the step before: one program serves all.
        way = jax.device_put(programs.step(given, begun, way, np.int32(i)), layouts)
        if before is not None:
            jax.block_until_ready(before)
            tick(i, steps)
        before = way[0][0]
    drawn = jax.block_until_ready(programs.finish(given, begun, way))
    tick(steps, steps)
    return drawn


def _keep(of: Program) -> tuple[str, ...]:
    """What is kept of each step, by its name in `samplers.sample`."""
    return (*["x0"] * of.film, *["x"] * of.maps)


def _walker(of: Program, start: Start) -> samplers.Solver:
    return of.solver if start.kept is None else keeping(of.solver, **start.kept)


def _finish(of: Program, given: Given, start: Start, z: Any, way: tuple[Any, ...]) -> Drawn:
    """The data, with what was to be kept put back, and what was seen on the way."""
    n, seen, model = len(given.keys), {}, of.model
    z = z if start.rest is None else z + start.rest
    if start.kept:
        z = editing.composite(start.kept["known"], z, start.kept["mask"])
    x = model.codec.decode(given.arrays, z)
    hole = given.rows.get("mask")
    if hole is None and start.kept:
        hole = begin.enlarged(start.kept["mask"], begin.factor(x, z))
    if hole is not None:
        x = editing.composite(given.rows["x"], x, hole)
        seen["mask"] = hole
    if of.film:
        frames = np.unique(np.linspace(0, len(way[0]) - 1, FILM).round().astype(int))
        seen["film"] = lax.map(lambda z: model.codec.decode(given.arrays, z), way[0][frames, -n:])
    if of.maps:
        cond, path = jax.tree.map(lambda a: a[-n:], (start.cond, way[-1].swapaxes(0, 1)))
        levels = start.levels
        seen["maps"] = heatmaps.of_steps(model, given.params, cond, levels, path.swapaxes(0, 1))
    if of.task == "prompt_to_prompt":
        seen["source"] = x[:n]
    return Drawn(x[-n:], **seen)
