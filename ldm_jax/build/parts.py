"""What both kinds of run are made of: mesh, data, optimizer, logging."""

from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from beartype.door import is_bearable
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ldm_jax.build.sections import checked, make, plain, section
from ldm_jax.build.workdir import LOG
from ldm_jax.data import pipeline as input_pipeline
from ldm_jax.training import compiled, loop, processes, sharding
from ldm_jax.types import Loss, Params

PIPELINE = dict(
    batch=int, size=int | tuple[int, ...], crop=str, flip=bool, workers=int, max_bad_rate=float
)
DATA = dict(source=dict | str, validation=dict) | PIPELINE
MESH = dict.fromkeys(sharding.AXES, int) | dict(dcn=dict)
OPTIMIZER = dict(ema=float, accumulate=int)  # of that section, what is not the optimizer's own


def make_section(package: str, value: Any, where: str, **more: Any) -> Any:
    """Calls what a section names below `ldm_jax.package` with the section's other entries."""
    given = section(value, where)
    return make(package, given.pop("name"), **more, **given)


def data(config: ConfigDict) -> dict[str, Any]:
    """The section of the data."""
    return checked("data", config.data, DATA, needed=("source", "validation", "batch", "size"))


def mesh(config: ConfigDict, devices: Sequence[Any] | None = None) -> Mesh:
    """The config's mesh, over all devices unless some are given."""
    given = checked("mesh", config.mesh, MESH)
    checked("mesh.dcn", given.get("dcn", {}), dict.fromkeys(sharding.AXES, int))
    return sharding.make_mesh(**given, devices=devices)


def source(config: ConfigDict, **override: Any) -> Any:
    """The source of the data, with some arguments changed: for validation those of `data.validation`."""
    where = "data.source"
    return make_section("data", section(data(config)["source"], where) | override, where)


def batches(config: ConfigDict, of: Any, fields: Sequence[str], **more: Any) -> Any:
    """The input pipeline over a source, this process's share of it; `fields` are those that a conditioner reads."""
    options = {k: v for k, v in data(config).items() if k in PIPELINE}
    if processes.several():
        index, count = sharding.share(mesh(config))
        options |= dict(process_index=index, process_count=count)
    made = {"tokens", *more.get("texts", ())}  # of captions
    options |= dict(fields=tuple(f for f in fields if f not in made))
    return input_pipeline.batches(of, **(options | dict(seed=config.seed) | more))


def validation(config: ConfigDict, **more: Any) -> Any:
    """The input pipeline over the validation source, always the same: centre crops, no flips."""
    of = source(config, **data(config)["validation"])
    return batches(config, of, crop="center", flip=False, shuffle=False, **more)


def validation_batches(config: ConfigDict, **more: Any) -> list[dict[str, np.ndarray]]:
    """The first few batches of the validation source."""
    return first_batches(config, validation(config, **more))


def shown(config: ConfigDict, **more: Any) -> Any:
    """The first examples of the validation source as one batch, whole on every process: what samples are shown of."""
    count = min(log_options(config)["samples"], data(config)["batch"])
    return validation(config, batch=count, process_index=0, process_count=1, **more)


def first_batches(config: ConfigDict, of: Any) -> list[dict[str, np.ndarray]]:
    """As many as the log's section asks for."""
    return [bare(of, i) for i in range(log_options(config)["batches"])]


def bare(of: Any, step: int) -> dict[str, np.ndarray]:
    """A batch without what is told about it."""
    return {k: v for k, v in of[step].items() if not k.startswith("_")}


def kept_step(
    config: ConfigDict, mesh: Mesh, of: Any, *more: Any, files: Iterable[Path] = ()
) -> compiled.Kept | None:
    """Starts to load the run's compiled step, if an earlier start kept one.

    It follows from the config without its log, the classes of the data `of`, `more` and the contents of `files`.
    """
    said = {k: v for k, v in plain(config).items() if k != "log"}
    devices = list(mesh.devices.flat)
    return compiled.begin(compiled.digest((said, of.classes, more), files, devices), devices)


def log_options(config: ConfigDict) -> dict[str, int]:
    return LOG | plain(config.log)


def optimizer_of(config: ConfigDict) -> tuple[optax.GradientTransformation, float, int]:
    """The optimizer, the decay of the moving average, and the micro-batches of a step."""
    options = section(config.optimizer, "optimizer")
    extra = {k: options.pop(k) for k in OPTIMIZER if k in options}
    checked("optimizer", extra, OPTIMIZER)
    ema, accumulate = float(extra.get("ema", 0.9999)), extra.get("accumulate", 1)
    if not 0.0 <= ema < 1.0:
        raise ValueError(f"optimizer.ema = {ema} is no decay; give a number from 0 to below 1")
    name = f"optimizer.{options.pop('name')}"
    return make("training", name, steps=config.steps, **options), ema, accumulate


def rules_of(config: ConfigDict) -> tuple[tuple[str, Any], ...]:
    """The rules of the layout."""
    rules = plain(config.sharding)
    if not is_bearable(rules, tuple[tuple[str, str | tuple[str | None, ...]], ...]):
        raise ValueError(
            f"sharding = {rules!r} is no list of (regex, layout), such as (('.*', 'fsdp'),)"
        )
    return rules


def run(
    config: ConfigDict,
    *,
    mesh: Mesh,
    init: Callable[[jax.Array], Params],
    loss: Loss,
    frozen: Params,
    batches: Callable[[int], Generator[dict[str, np.ndarray]]],
    evaluate: Callable[[Params, Params], loop.Evaluation],
    example: dict[str, np.ndarray],
    load: Callable[[Any], Params] | None = None,
    kept: compiled.Kept | None = None,
) -> loop.Run:
    """A Run; its optimizer, schedule and logging are those of the config. `frozen` lies on the mesh.

    Parameters and loss are gone through by shape, with the fields of `example`, so that what does not fit is known
    before any compile.

    Raises:
      ValueError: the batch does not divide over the mesh, a rule of the sharding fits no parameter, or shapes that do
        not fit each other.
    """
    optimizer, ema, accumulate = optimizer_of(config)
    log = log_options(config)
    batch = data(config)["batch"]
    sharding.check_batch(batch, mesh, accumulate)
    sharding.check_space(example["x"].shape[1:-1], mesh)
    rules = rules_of(config)
    shapes = jax.eval_shape(init, jax.random.key(0))
    sharding.layouts(mesh, rules, shapes)
    micro = {
        k: jax.ShapeDtypeStruct((batch // accumulate, *v.shape[1:]), v.dtype)
        for k, v in example.items()
    }
    jax.eval_shape(
        loss, shapes, frozen, micro, jax.random.key(0), jax.ShapeDtypeStruct((), np.int32)
    )
    return loop.Run(
        seed=config.seed,
        steps=config.steps,
        mesh=mesh,
        rules=rules,
        init=init,
        loss=loss,
        optimizer=optimizer,
        frozen=frozen,
        batches=batches,
        evaluate=evaluate,
        ema=ema,
        accumulate=accumulate,
        log_every=log["every"],
        eval_every=log["evaluate"],
        save_every=log["save"],
        keep=log["keep"],
        max_skipped=log["max_skipped"],
        load=load,
        kept=kept,
    )
