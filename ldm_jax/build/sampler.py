"""How a run's config samples, and the samples that its training shows."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ldm_jax.build.sections import check_arguments, checked, did_you_mean, parameters, section
from ldm_jax.diffusion import grids, samplers, solvers
from ldm_jax.diffusion.process import Path
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.pipeline import Sampling, make_sampler
from ldm_jax.training import sharding
from ldm_jax.types import Params

SAMPLER = dict(solver=str | dict, steps=int, spacing=str | dict, guidance=float, rescale=float)
COMMON = ("to_zero", "shift", "terminal", "restarts")  # of every grid


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


def grid(value: Any, path: Path, steps: int) -> samplers.Point:
    """The grid that a spacing names, with its options and those of every grid: `dict(name="karras", rho=5.0)`.

    Raises:
      ValueError: an unknown one or an option that it does not take ("did you mean"), levels that cannot be.
    """
    options = section(value, "sampler.spacing")
    name = options.pop("name")
    if name not in grids.SPACINGS:
        raise ValueError(f"there is no spacing {name!r}{did_you_mean(name, grids.SPACINGS)}")
    own = grids.options_of(name)
    for key in options:
        if key not in (*own, *COMMON):
            raise ValueError(
                f"the spacing {name!r} takes no {key!r}{did_you_mean(key, (*own, *COMMON))}"
            )
    if options.get("shift") and isinstance(options["shift"], dict):
        check_arguments(grids.resolution_shift, "sampler.spacing.shift", options["shift"])
    return grids.grid(path, steps, name, **options)


def sampling(
    config: ConfigDict, of: LatentDiffusion, film: bool = False, **override: Any
) -> Sampling:
    """The config's sampler, with what a user overrides.

    Raises:
      ValueError: an unknown solver or spacing ("did you mean"), or guidance of a model without conditions.
    """
    given = checked("sampler", config.sampler, SAMPLER, needed=("solver", "steps")) | override
    if given.get("guidance", 1.0) != 1.0 and of.conditioner is None:
        raise ValueError(
            "this model is unconditional, so there is nothing to guide it by; leave guidance out"
        )
    walk = solver(given["solver"], of.path)
    points = grid(given.get("spacing", "uniform"), of.path, given["steps"])
    about = {k: str(v) for k, v in given.items()}
    scale, phi = float(given.get("guidance", 1.0)), float(given.get("rescale", 0.0))
    return Sampling(walk, points, scale, phi, film, tuple(about.items()))


def drawer(
    config: ConfigDict,
    of: LatentDiffusion,
    shape: tuple[int, ...],
    mesh: Mesh,
    fixed: dict[str, np.ndarray],
    count: int,
) -> Callable[[Params, Params], np.ndarray]:
    """`(params, frozen) -> samples` for the conditions of a fixed batch and fixed seeds; `shape` is a latent's."""
    how = sampling(config, of)
    sample = make_sampler(of, shape, how)
    rows = np.arange(sharding.round_up(count, mesh)) % len(fixed["x"])
    placed = sharding.place(mesh, {k: v[rows] for k, v in fixed.items()})
    keys = jax.random.split(jax.random.key(config.seed), len(rows))

    def draw(params, frozen):
        scale = jnp.float32(how.guidance)
        x, _ = sample(params, frozen, placed, keys, how.points, scale)
        return np.asarray(x)[:count]

    return draw
