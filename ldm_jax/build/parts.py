"""What both kinds of run are made of: mesh, data, optimizer, logging."""

import functools
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from beartype.door import is_bearable
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ldm_jax import flops
from ldm_jax.build import updates
from ldm_jax.build.sections import checked, make_section, plain, section
from ldm_jax.build.workdir import GUARDS, LOG, TOLD
from ldm_jax.data import latents
from ldm_jax.data import pipeline as input_pipeline
from ldm_jax.nn import once
from ldm_jax.training import checkpoints, compiled, guards, loop, processes, sharding
from ldm_jax.types import Loss, Params

PIPELINE = dict(
    batch=int,
    size=int | tuple[int, ...],
    crop=str,
    flip=bool,
    workers=int,
    max_bad_rate=float,
    shrink=int,
    degradation=str,
    holes=tuple[str, ...],
    layout=dict,
)
DATA = (
    dict(source=dict | str, validation=dict, cached=str, blank=float, buckets=dict | tuple)
    | PIPELINE
)
LAYOUT = dict(classes=tuple[tuple[str, int], ...], objects=int, vocab=int, window=bool)
SPLITS = ("train", "validation")  # of a cache
MESH = dict.fromkeys(sharding.AXES, int) | dict(dcn=dict)


def data(config: ConfigDict) -> dict[str, Any]:
    """The section of the data."""
    return checked("data", config.data, DATA, needed=("source", "validation", "batch", "size"))


def layout(config: ConfigDict) -> dict[str, Any] | None:
    """The arguments of `data.layout.Layout`; None where the config says nothing of boxes."""
    given = data(config).get("layout")
    return None if given is None else checked("data.layout", given, LAYOUT, needed=("classes",))


def mesh(config: ConfigDict, devices: Sequence[Any] | None = None) -> Mesh:
    """The config's mesh, over all devices unless some are given."""
    given = checked("mesh", config.mesh, MESH)
    checked("mesh.dcn", given.get("dcn", {}), dict.fromkeys(sharding.AXES, int))
    return sharding.make_mesh(**given, devices=devices)


def source(config: ConfigDict, **override: Any) -> Any:
    """The source of the data, with some arguments changed: for validation those of `data.validation`."""
    where = "data.source"
    return make_section("data", section(data(config)["source"], where) | override, where)


def training(config: ConfigDict) -> Any:
    """The source that is trained on: the pictures, or what the cache in `data.cached` holds of them."""
    return cached_source(config, "train") if data(config).get("cached") else source(config)


def cached_source(config: ConfigDict, split: str) -> latents.Cached:
    """A split of the cache in `data.cached`.

    Raises:
      FileNotFoundError: it is not there, or not whole.
      ValueError: it was not made as the config has it.
    """
    options = data(config)
    of = latents.cached(options["cached"], split)
    size, _, flip = view(config)
    if of.plan.size != size:
        raise ValueError(
            f"the cache {options['cached']!r} is of pictures of {of.plan.size}, and data.size is {size}; "
            "write another one, or say --config.data.size"
        )
    if flip and of.plan.flips == 1:
        raise ValueError(
            f"the cache {options['cached']!r} has no mirror images, and data.flip is set; write it with data.flip, "
            "or say --config.data.flip=False"
        )
    return of


def view(config: ConfigDict) -> tuple[tuple[int, int], str, bool]:
    """Size (h, w), crop and flip of the data.

    Raises:
      ValueError: random crops of what is encoded once.
    """
    options = data(config)
    size = options["size"] if isinstance(options["size"], tuple) else (options["size"],) * 2
    crop, flip = options.get("crop", "center"), options.get("flip", False)
    if crop != "center":
        raise ValueError(
            f"data.crop = {crop!r}, and a cache holds each picture once, cut in its centre; "
            "say --config.data.crop=center, or train on the pictures themselves"
        )
    return size, crop, flip


def batches(config: ConfigDict, of: Any, fields: Sequence[str], **more: Any) -> Any:
    """The input pipeline over a source, this process's share of it; `fields` are those that a conditioner reads."""
    return input_pipeline.batches(of, **reading(config, of, fields, **more))


def reading(config: ConfigDict, of: Any, fields: Sequence[str], **more: Any) -> dict[str, Any]:
    """How a source is read: the options of the input pipeline."""
    options = {k: v for k, v in data(config).items() if k in PIPELINE}
    options |= dict(layout=layout(config))
    if processes.several():
        index, count = sharding.share(mesh(config))
        options |= dict(process_index=index, process_count=count)
    made = {"tokens", *more.get("texts", ()), "masked"}  # of captions, and by the codec
    options |= dict(fields=tuple(f for f in fields if f not in made))
    options |= dict(seed=config.seed) | more
    if isinstance(of, latents.Cached):
        flip = options.get("flip", False)
        options |= dict(show=functools.partial(latents.shown, flip=flip))
    return options


def validation(config: ConfigDict, **more: Any) -> Any:
    """The input pipeline over the validation source, always the same: centre crops, no flips."""
    if data(config).get("cached"):
        of = cached_source(config, "validation")
    else:
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

    It follows from the config without guards, evaluation and log (but `log.norms`), the classes of the data `of`,
    `more` and the contents of `files`.
    """
    said = {k: v for k, v in plain(config).items() if k not in ("log", "guards", "evaluation")}
    said["norms"] = log_options(config)["norms"]
    if said["data"].get("buckets"):
        return None  # there is a step for each of them
    devices = list(mesh.devices.flat)
    return compiled.begin(compiled.digest((said, of.classes, more), files, devices), devices)


def log_options(config: ConfigDict) -> dict[str, Any]:
    return LOG | TOLD | plain(config.log)


def guards_of(config: ConfigDict) -> guards.Guards:
    log = log_options(config)
    given = GUARDS | plain(config.get("guards", {}))
    return guards.Guards(**given, metric=log["metric"], lowest=log["goal"] == "min")


def operations(loss: Loss, *shapes: Any) -> int:
    """Those of the loss and its gradient as the model defines them, with nothing computed a second time."""
    with once.every():
        return flops.flops(jax.value_and_grad(loss, has_aux=True), *shapes)


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
    shapes: Sequence[dict[str, np.ndarray]] = (),
    told: str = "",
    load: Callable[[Any], Params] | None = None,
    kept: compiled.Kept | None = None,
    judged: loop.Periodic | None = None,
) -> loop.Run:
    """A Run; its optimizer, schedule and logging are those of the config. `frozen` lies on the mesh.

    Parameters and loss are gone through by shape, with the fields of `example` and of every bucket (`shapes`), so that
    what does not fit is known before any compile. `told` is what is told of the data.

    Raises:
      ValueError: the batch does not divide over the mesh, a rule of the sharding fits no parameter, or shapes that do
        not fit each other.
    """
    optimizer, ema, accumulate = updates.optimizer_of(config)
    log, watched = log_options(config), guards_of(config)
    batch = data(config)["batch"]
    sharding.check_batch(batch, mesh, accumulate)
    sharding.check_space(example["x"].shape[1:-1], mesh)
    rules = rules_of(config)
    init = jax.jit(init)  # traced once: here, for the state's shapes, and for the state
    params = jax.eval_shape(init, jax.random.key(0))
    sharding.layouts(mesh, rules, params)

    def of_batch(rows, example):
        return {k: jax.ShapeDtypeStruct((rows, *v.shape[1:]), v.dtype) for k, v in example.items()}

    def of_loss(rows, example):
        held = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), frozen)
        fields = of_batch(rows, example)
        return params, held, fields, jax.random.key(0), jax.ShapeDtypeStruct((), np.int32)

    # A step that was kept was gone through when it was made.
    if kept is None or kept.loading is None:
        jax.eval_shape(loss, *of_loss(batch // accumulate, example))
    for bucket in shapes:
        h, w = bucket["x"].shape[1:3]
        try:
            sharding.check_space((h, w), mesh)
            jax.eval_shape(loss, *of_loss(batch // accumulate, bucket))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"the bucket {h}x{w} of data.buckets fits neither model nor mesh: {error}"
            ) from error
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
        keep=checkpoints.Keep(log["keep"], log["keep_every"], log["keep_best"], watched.lowest),
        max_skipped=log["max_skipped"],
        load=load,
        kept=kept,
        guards=watched,
        batch=batch,
        shapes=tuple(of_batch(batch, bucket) for bucket in shapes),
        told=told,
        operations=functools.partial(operations, loss, *of_loss(batch, example)),
        wandb=log["wandb"],
        groups=updates.groups_of(config, params),
        judged=judged,
    )
