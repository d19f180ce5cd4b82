"""How a run's config samples, and the samples that its training shows."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ldm_jax import guided
from ldm_jax.build.sections import (
    check_arguments,
    checked,
    did_you_mean,
    parameters,
    plain,
    section,
)
from ldm_jax.diffusion import grids, samplers, solvers, spacings
from ldm_jax.diffusion.inversion import INVERTIBLE
from ldm_jax.diffusion.process import Path
from ldm_jax.latent_diffusion import PICTURES, LatentDiffusion
from ldm_jax.tasks import Sampling, make_sampler
from ldm_jax.training import processes, sharding
from ldm_jax.types import Params

SAMPLER = dict(
    solver=str | dict, steps=int, spacing=str | dict, guidance=float | dict, rescale=float
)
COMMON = ("to_zero", "shift", "terminal", "restarts")  # of every grid
WHERE = "sampler.guidance"
GUIDANCE = dict(
    scale=float,
    rescale=float,
    threshold=float,
    limit=float,
    interval=tuple[float, float],
    two_passes=bool,
    eta=float,
    radius=float,
    zero_steps=int,
    strength=float,
    blocks=tuple[str, ...],
)
WEAKER = dict(run=str, checkpoint=int)  # of autoguidance: which model is the weaker one
Weaker = Callable[[str | None, int | None], tuple[LatentDiffusion, Params]]


def solver(value: Any, path: Path) -> samplers.Solver:
    """The solver that a section names, for a path.

    Raises:
      ValueError: an unknown one ("did you mean"), or options that it does not take.
    """
    options = section(value, "sampler.solver")
    name = options.pop("name")
    if name not in solvers.TABLE:
        raise ValueError(f"there is no solver {name!r}{did_you_mean(name, solvers.TABLE)}")
    of = solvers.TABLE[name].make
    check_arguments(of, name, options | {k: path for k in parameters(of) if k == "path"})
    return solvers.make(name, path, **options)


def adds_noise(value: Any) -> bool:
    """Whether the solver that a section names is stochastic, with the section's options."""
    options = section(value, "sampler.solver")
    return solvers.TABLE[options["name"]].stochastic or bool(options.get("eta"))


def grid(value: Any, path: Path, steps: int) -> samplers.Point:
    """The grid that a spacing names, with its options and those of every grid: `dict(name="karras", rho=5.0)`.

    Raises:
      ValueError: an unknown one or an option that it does not take ("did you mean"), levels that cannot be.
    """
    options = section(value, "sampler.spacing")
    name = options.pop("name")
    if name not in spacings.SPACINGS:
        raise ValueError(f"there is no spacing {name!r}{did_you_mean(name, spacings.SPACINGS)}")
    own = spacings.options_of(name)
    for key in options:
        if key not in (*own, *COMMON):
            raise ValueError(
                f"the spacing {name!r} takes no {key!r}{did_you_mean(key, (*own, *COMMON))}"
            )
    if options.get("shift") and isinstance(options["shift"], dict):
        check_arguments(grids.resolution_shift, "sampler.spacing.shift", options["shift"])
    return grids.grid(path, steps, name, **options)


def guidance(value: float | dict, steps: int) -> tuple[float, guided.How, dict[str, Any]]:
    """The scale, the kind and the other numbers of guidance, from a scale or a section.

    Raises:
      ValueError: an unknown kind or option ("did you mean"), or a value that is out of range.
    """
    given = section(value if isinstance(value, dict) else {"name": "cfg", "scale": value}, WHERE)
    name = given.pop("name")
    if name not in guided.KINDS:
        raise ValueError(f"there is no guidance {name!r}{did_you_mean(name, guided.KINDS)}")
    takes = {k: GUIDANCE[k] for k in (*guided.COMMON, *guided.KINDS[name])}
    if name == "auto":
        takes |= WEAKER
    numbers = guided.KINDS[name] | checked(WHERE, given, takes)
    if name == "auto" and not numbers.keys() & WEAKER.keys():
        raise ValueError(
            f"{WHERE}: auto leads away from a weaker model; give the work directory of one as run, an earlier "
            "checkpoint of this run as checkpoint, or both"
        )
    numbers = {k: v for k, v in numbers.items() if k not in WEAKER}
    scale = float(numbers.pop("scale", 1.0))
    how = guided.How(name, numbers.pop("blocks", ()), numbers.pop("two_passes", False))
    guided.check(how, numbers, steps, WHERE)
    return scale, how, numbers


def warn_of_drop(config: ConfigDict) -> None:
    """Where guidance leads away from a null condition that was never trained."""
    rates = plain(config.objective.get("drop", 0.0))
    if "init" not in config and not any(rates.values() if isinstance(rates, dict) else [rates]):
        logging.warning(
            "guidance leads away from the null condition, which this model has never seen (objective.drop = 0); "
            "expect worse pictures than without, or train with objective.drop = 0.1"
        )


def sampling(
    config: ConfigDict,
    of: LatentDiffusion,
    film: bool = False,
    heatmaps: bool = False,
    weaker: Weaker | None = None,
    **override: Any,
) -> Sampling:
    """The config's sampler, with what a user overrides; a number as guidance is the scale, whatever its kind.

    `weaker(run, checkpoint)` opens the model that autoguidance leads away from; without it there is none.

    Raises:
      ValueError: an unknown solver, spacing or guidance ("did you mean"), or guidance of a model without conditions.
    """
    given = checked("sampler", config.sampler, SAMPLER, needed=("solver", "steps"))
    before, new = given.get("guidance", 1.0), override.get("guidance")
    if isinstance(before, dict) and isinstance(new, float | int):
        override["guidance"] = before | {"scale": float(new)}
    given |= override
    scale, how, numbers = guidance(given.get("guidance", 1.0), given["steps"])
    weak = None
    if how.name == "auto":
        named = [given["guidance"].get(key) for key in WEAKER]
        if weaker is None:
            logging.warning("samples are drawn without autoguidance while the run trains")
        if scale == 1.0 or weaker is None:
            how, scale = guided.How(), 1.0
        else:
            model, weak = weaker(*named)
            how = dataclasses.replace(how, weak=model)
    elif scale != 1.0 and not {*of.fields} - {*PICTURES}:
        reads = "reads pictures alone" if of.fields else "is unconditional"
        raise ValueError(
            f"this model {reads}, so there is nothing to guide it by; leave guidance out"
        )
    if scale != 1.0 and weak is None:
        warn_of_drop(config)
    if given.get("rescale", 0.0):
        numbers["rescale"] = given["rescale"]
    walk, noisy = solver(given["solver"], of.path), adds_noise(given["solver"])
    points = grid(given.get("spacing", "uniform"), of.path, given["steps"])
    about = {k: str(v) for k, v in given.items()}
    return Sampling(
        solver=walk,
        points=points,
        guidance=scale,
        film=film,
        heatmaps=heatmaps,
        how=how,
        numbers=numbers,
        weak=weak,
        stochastic=noisy,
        invertible=noisy and section(given["solver"], "sampler.solver")["name"] in INVERTIBLE,
        about=tuple(about.items()),
    )


def drawer(
    config: ConfigDict,
    of: LatentDiffusion,
    shape: tuple[int, ...],
    mesh: Mesh,
    shown: dict[str, np.ndarray],
) -> Callable[[Params, Params], np.ndarray]:
    """`(params, frozen) -> samples` for the conditions of `shown` and fixed seeds; `shape` is a latent's.

    Every process has all of `shown`, and gets all samples. Autoguidance is left out: its weaker model may be a
    checkpoint that is still to come.
    """
    how = sampling(config, of)
    sample = make_sampler(of, shape, how)
    count = len(shown["x"])
    rows = np.arange(sharding.round_up(count, mesh)) % count
    placed = sharding.spread(mesh, {k: v[rows] for k, v in shown.items()})
    keys = jax.random.split(jax.random.key(config.seed), len(rows))

    def draw(params, frozen):
        scale = jnp.float32(how.guidance)
        drawn = sample(params, frozen, placed, keys, how.points, scale, how.traced())
        return processes.fetch(drawn.x)[:count]

    return draw
