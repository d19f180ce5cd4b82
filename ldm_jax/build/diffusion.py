"""Stage 2: the run of a diffusion model, and the pipeline that samples from it."""

import dataclasses
import functools
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ldm_jax import codec, conditioners
from ldm_jax.build import (
    autoencoder,
    buckets,
    cached,
    extras,
    judged,
    parts,
    sampler,
    starting,
    updates,
    workdir,
)
from ldm_jax.build.conditioner import conditioner, example
from ldm_jax.build.sections import checked, did_you_mean, section
from ldm_jax.data import tokenizer as text
from ldm_jax.diffusion import objectives, process
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.pipeline import Pipeline
from ldm_jax.training import (
    checkpoints,
    diffusion_loss,
    evaluation,
    loop,
    manifest,
    processes,
    sharding,
)
from ldm_jax.types import Params

Named = str | dict  # a section
OBJECTIVE = dict(
    name=str,
    times=Named,
    weight=Named,
    kind=str,
    offset_noise=float,
    drop=float | dict,
    bound=float,
)
TOKENIZER = dict(kind=str, vocab=int, length=int)
SCALE_BATCHES = 8  # batches from which the scale of the latents is measured


def tokenizer(
    config: ConfigDict, directory: Path, source: Any = None
) -> tuple[Any, dict[str, Any]]:
    """The tokenizer of the run, and what a text conditioner has to know of it.

    It is learnt from the source's captions when the work directory has none yet; `keep_tokenizer` writes it there.
    """
    if "tokenizer" not in config:
        return None, {}
    given = checked("tokenizer", config.tokenizer, TOKENIZER, needed=TOKENIZER)
    path = directory / "tokenizer.json"
    if path.is_file():
        trained = text.load(path)
    elif source is None:
        raise FileNotFoundError(
            f"{path} is missing; the run in {directory} is incomplete, train it anew"
        )
    else:
        with tempfile.TemporaryDirectory() as folder:
            learnt = Path(folder) / path.name
            trained = text.train(
                source.captions(), learnt, vocab=given["vocab"], kind=given["kind"]
            )
    null = tuple(int(i) for i in text.null_ids(trained, given["length"]))
    return trained, {"vocab": given["vocab"], "length": given["length"], "null": null}


def keep_tokenizer(trained: Any, directory: Path) -> None:
    if trained is not None and not (directory / "tokenizer.json").is_file():
        workdir.remember(directory / "tokenizer.json", json.loads(trained.to_str()))


def codec_of(
    config: ConfigDict, mesh: Mesh, step: int | None
) -> tuple[codec.Codec, Params, dict[str, Any]]:
    """The codec, its arrays (the scale still 1), and where they come from; `step` is of the autoencoder's run.

    Raises:
      FileNotFoundError: the autoencoder's run has no checkpoint, or not that of this step.
      ValueError: that run is not one of an autoencoder.
    """
    given = section(config.codec, "codec")
    kind = given.pop("name")
    if kind == "identity":
        checked("codec", given, {})
        return codec.identity(), {}, {}
    if kind != "from_autoencoder":
        raise ValueError(
            f"codec.name = {kind!r} is unknown{did_you_mean(kind, ['identity', 'from_autoencoder'])}"
        )
    run = checked("codec", given, {"run": str}, needed=("run",))["run"]
    theirs = workdir.read_config(run)
    if workdir.check_config(theirs) != "autoencoder":
        raise ValueError(
            f"codec.run = {run!r} is not the run of an autoencoder; give the workdir of one"
        )
    coder, arrays, step = autoencoder.loaded(theirs, run, mesh, step)
    return coder, arrays, {"run": run, "step": step}


def model(
    config: ConfigDict,
    mesh: Mesh,
    directory: Path,
    provided: dict[str, Any],
    step: int | None = None,
) -> tuple[LatentDiffusion, Params, dict[str, Any]]:
    """The model, the codec's arrays and their origin.

    A run goes on with the step of the autoencoder that it was started with; `step` is that of a new run.
    """
    before = stored(directory)
    coder, arrays, origin = codec_of(config, mesh, before["step"] if before else step)
    return assembled(config, coder, provided), arrays, origin


def assembled(config: ConfigDict, coder: codec.Codec, provided: dict[str, Any]) -> LatentDiffusion:
    """The model of a config around a codec."""
    path = parts.make_section("diffusion.paths", config.path, "path")
    target = parts.make_section("diffusion.targets", config.target, "target")
    process.check(path, target)
    network = parts.make_section("models", config.model, "model")
    blank = config.data.get("blank", 0.0)
    return LatentDiffusion(
        network, conditioner(config, provided), coder, path, target, blank=float(blank)
    )


def measure_scale(encode: Any, arrays: Params, batches: Sequence[jax.Array]) -> float:
    """1 / the standard deviation of the latents of these batches, which lie on the mesh."""
    encode = jax.jit(encode)
    z = [
        processes.fetch(encode(arrays, x, jax.random.key(i))).astype(np.float64)
        for i, x in enumerate(batches)
    ]
    return float(1.0 / np.std(np.concatenate([of.ravel() for of in z])))


def stored(directory: Path) -> dict[str, Any] | None:
    """What a run has written down about its codec: run, step and scale."""
    path = directory / "codec.json"
    return json.loads(path.read_text()) if path.is_file() else None


def with_scale(
    coder: codec.Codec,
    arrays: Params,
    origin: dict[str, Any],
    directory: Path,
    mesh: Mesh,
    batches: Any = None,
) -> Params:
    """The codec's arrays with the scale of the run: measured once on the first batches, then read from `codec.json`.

    Raises:
      FileNotFoundError: nothing was measured yet and there are no batches.
    """
    if not origin:
        return arrays
    path = directory / "codec.json"
    before = stored(directory)
    if before is not None:
        scale = before["scale"]
    else:
        if batches is None:
            raise FileNotFoundError(
                f"{path} is missing; the run in {directory} is incomplete, train it anew"
            )
        count = min(SCALE_BATCHES, len(batches))
        first = [sharding.place(mesh, {"x": batches[i]["x"]})["x"] for i in range(count)]
        scale = measure_scale(coder.encode, arrays, first)
        workdir.remember(path, origin | {"scale": scale})
    logging.info("latents of %s are multiplied by %.5f", origin["run"], scale)
    return arrays | {"scale": jnp.asarray(scale, jnp.float32)}


def latent_shape(config: ConfigDict, coder: codec.Codec) -> tuple[int, ...]:
    return coder.shape(autoencoder.data_shape(config))


def init(
    config: ConfigDict, of: LatentDiffusion, provided: dict[str, Any], key: jax.Array
) -> Params:
    shape = latent_shape(config, of.codec)
    given = example(config, of.fields, provided, shape)
    return of.init(key, jnp.zeros((1, *shape)), given)


def objective(config: ConfigDict, of: LatentDiffusion) -> tuple[Any, float | dict[str, float]]:
    """The loss in latent space as a function of the network, and the drop rates, by the config's `objective`."""
    given = checked("objective", config.objective, OBJECTIVE)
    where = "objective.times"
    times = parts.make_section(
        "diffusion.times", given.get("times", "uniform"), where, path=of.path
    )
    weight = parts.make_section(
        "diffusion.weightings", given.get("weight", "uniform"), "objective.weight"
    )
    options = {k: given[k] for k in ("kind", "offset_noise", "bound") if k in given}

    def loss(network):
        return objectives.diffusion_loss(network, of.path, of.target, times, weight, **options)

    return loss, given.get("drop", 0.0)


def learning(
    config: ConfigDict,
    of: LatentDiffusion,
    *,
    mesh: Mesh,
    fixed: Sequence[dict[str, np.ndarray]],
    shown: dict[str, np.ndarray],
    captions: Sequence[str] | None,
    together: Sequence[str] = (),
    whole: Callable[..., Any] = lambda f: f,
    **more: Any,
) -> loop.Run:
    """The run of a model by the config's objective; `fixed` are for validation, `shown` and their `captions` are drawn.

    `whole` turns functions of the model's parameters and the codec's arrays into functions of what the run trains and
    what it does not; `together` is `diffusion_loss`'s, and the rest `parts.run`'s.
    """
    objective_, drop = objective(config, of)
    validation = diffusion_loss.diffusion_loss(of, objective_, 0.0, train=False)
    draw = sampler.drawer(config, of, latent_shape(config, of.codec), mesh, shown)
    return parts.run(
        config,
        mesh=mesh,
        loss=whole(diffusion_loss.diffusion_loss(of, objective_, drop, together=together)),
        evaluate=evaluation.diffusion(whole(validation), mesh, fixed, whole(draw), captions),
        example=fixed[0],
        **more,
    )


def run(config: ConfigDict, directory: Path) -> loop.Run:
    mesh = parts.mesh(config)
    source = parts.training(config)
    workdir.compare(config, source, directory)
    trained, provided = tokenizer(config, directory, source)
    if source.classes:
        provided["classes"] = len(source.classes)
    given = section(config.codec, "codec")
    files = [Path(given["run"], "config.json")] if isinstance(given.get("run"), str) else []
    kept = parts.kept_step(config, mesh, source, provided, cached.identity(source), files=files)
    whole, arrays, origin = model(config, mesh, directory, provided, cached.step(source))
    of = cached.model(whole, source, lambda: cached.digest(arrays))
    reading = dict(fields=of.fields, tokenizer=trained, length=provided.get("length", 0))
    reading["classes"] = conditioners.counted(of.conditioner)
    batches = buckets.batches(config, source, **reading)
    fixed = parts.validation_batches(config, **reading)
    shown = parts.bare(parts.shown(config, **reading), 0)
    captions = None
    if trained is not None:
        captions = [trained.decode(ids) for ids in shown["tokens"]]
    begin = functools.partial(init, config, of, provided)
    begun = bool(manifest.steps(Path(directory) / checkpoints.FOLDER))
    load = starting.load(config, of, begin) if "start" in config and not begun else None
    open_ = functools.partial(_pipeline, config, whole, trained, provided, mesh, source.classes)
    made = learning(
        config,
        of,
        mesh=mesh,
        fixed=fixed,
        shown=shown,
        captions=captions,
        init=begin,
        load=load,
        frozen=jax.device_put(arrays, sharding.replicated(mesh)),
        batches=batches.iterate,
        shapes=buckets.shapes(batches),
        told=buckets.told(batches),
        kept=kept,
        judged=judged.diffusion(config, directory, open_(None, arrays), open_),
    )
    workdir.claim(config, source, directory)
    keep_tokenizer(trained, directory)
    scaled = with_scale(of.codec, made.frozen, origin, directory, mesh, batches)
    return made._replace(frozen=jax.device_put(scaled, sharding.replicated(mesh)))


def pipeline(
    config: ConfigDict, directory: Path, step: int | None = None, ema: str | None = None
) -> Pipeline:
    mesh, average = sharding.make_mesh(), updates.average_of(config, ema)
    trained, provided = tokenizer(config, directory)
    classes = workdir.classes(directory)
    if classes:
        provided["classes"] = len(classes)
    of, arrays, origin = model(config, mesh, directory, provided)
    arrays = with_scale(of.codec, arrays, origin, directory, mesh)
    shapes = jax.eval_shape(functools.partial(init, config, of, provided), jax.random.key(0))
    shardings = jax.tree.map(lambda _: sharding.replicated(mesh), shapes)
    params, at = checkpoints.load_ema(directory, shapes, shardings, step, average)
    made = _pipeline(config, of, trained, provided, mesh, classes, params, arrays, at)
    return dataclasses.replace(made, **extras.of(config, workdir.kinds(directory)))


def _pipeline(
    config: ConfigDict,
    of: LatentDiffusion,
    trained: Any,
    provided: dict[str, Any],
    mesh: Mesh,
    classes: tuple[str, ...] | None,
    params: Params,
    arrays: Params,
    step: int = 0,
) -> Pipeline:
    """The pipeline of a model; `trained` is its tokenizer."""
    length, texts, words = provided.get("length", 0), {}, None
    if trained is not None:
        texts["tokens"] = lambda rows: text.encode(trained, rows, length)
        words = functools.partial(text.words, trained, length=length)
    return Pipeline(
        model=of,
        params=params,
        arrays=arrays,
        shape=latent_shape(config, of.codec),
        mesh=mesh,
        step=step,
        config_hash=workdir.config_hash(config),
        texts=texts,
        shrink=config.data.get("shrink", 1),
        words=words,
        classes=classes,
    )
