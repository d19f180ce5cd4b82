"""The section `evaluation`: what is measured of samples or reconstructions at intervals, while a run trains.

    evaluation = dict(every=5_000, metrics=("fid", "prdc"), features="shapes:features.safetensors", n=1_000)

Of a diffusion model samples are drawn under the conditions of the first `n` validation examples, with the seeds `seed`,
`seed` + 1, ...; of an autoencoder these examples are reconstructed. Both as `python -m ldm_jax.evaluate` does with a
checkpoint, by the first moving average. Nothing of it reaches the training: its random numbers, its data and its state
are its own.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ldm_jax import codec
from ldm_jax.build import held_out, parts, sampler
from ldm_jax.build.sections import checked, did_you_mean
from ldm_jax.build.workdir import JUDGED
from ldm_jax.pipeline import Pipeline, reconstructed
from ldm_jax.quality import judging, pictures, scores, subjects
from ldm_jax.quality.subjects import Subject
from ldm_jax.training import guards, processes
from ldm_jax.training.run import Evaluation, Periodic
from ldm_jax.types import Params

OWN = dict(every=int, metrics=tuple[str, ...], n=int, batch=int, features=str, resize=str)
OWN |= dict(weights=tuple[str, ...], lpips=tuple[str, ...])
SAMPLES = OWN | dict(clip=str, reference=str, subset=int, seed=int, steps=int, guidance=float)
OF_SAMPLES = (*scores.METRICS, scores.PATCHES, "clip")
OF_CODEC = ("rfid", *scores.PAIRS)
LEAST = dict(every=1, n=1, batch=1, subset=2, seed=0, steps=1)


def diffusion(
    config: ConfigDict,
    directory: Path,
    of: Pipeline,
    opened: Callable[[Params, Params], Pipeline],
) -> Periodic | None:
    """What measures a diffusion model; None where the config does not ask for it.

    `of` is the pipeline without arrays, and `opened(params, frozen)` with them.

    Raises:
      ValueError, FileNotFoundError: whatever is known to be wrong before anything is compiled.
    """
    if "evaluation" not in config:
        return None
    given = _section(config, SAMPLES, OF_SAMPLES, "that of a diffusion model", OF_CODEC)
    override = {k: given[k] for k in ("steps", "guidance") if k in given}
    sampling = sampler.sampling(config, of.model, **override)
    shown = held_out.validation(config, given["n"], of)
    reference, named = None, given.get("reference", "")
    if named and not named.endswith(".npz"):
        height, width = np.broadcast_to(parts.data(config)["size"], 2)
        reference = pictures.of_folder(named, int(height) if height == width else None)
    subject = subjects.of_model(
        opened,
        sampling,
        reference,
        shown.pictures(),
        shown.conditions,
        shown.captions,
        given["seed"],
        given["batch"],
    )
    statistics = named if named.endswith(".npz") else None
    return _periodic(config, directory, given, subject, of.mesh, statistics=statistics)


def autoencoder(config: ConfigDict, directory: Path, model: Any, mesh: Mesh) -> Periodic | None:
    """What measures a first stage; None where the config does not ask for it.

    Raises:
      ValueError, FileNotFoundError: as in `diffusion`.
    """
    if "evaluation" not in config:
        return None
    given = _section(config, OWN, OF_CODEC, "that of an autoencoder", OF_SAMPLES)
    coder, one = codec.autoencoder(model), np.ones((), np.float32)

    def reconstruct(params, frozen):
        arrays = {"params": params["gen"], "scale": one}
        return lambda x, size: reconstructed(coder, arrays, mesh, x, size)

    original = held_out.validation(config, given["n"]).pictures()
    subject = subjects.of_autoencoder(reconstruct, original, given["batch"])
    return _periodic(config, directory, given, subject, mesh)


def _section(
    config: ConfigDict,
    types: dict[str, Any],
    metrics: Sequence[str],
    what: str,
    others: Sequence[str],
) -> dict[str, Any]:
    """The section with its defaults; `metrics` are those that it may name, `others` those of the other stage."""
    given = checked("evaluation", config.evaluation, types, needed=("every", "metrics"))
    defaults = judging.Asked(())._asdict() | dict(n=1000, seed=0)
    given = {k: v for k, v in defaults.items() if k in types} | given
    for name, least in LEAST.items():
        if given.get(name, least) < least:
            raise ValueError(f"evaluation.{name} = {given[name]} must be at least {least}")
    if not given["metrics"]:
        raise ValueError(f"evaluation.metrics names none; choose of {', '.join(metrics)}")
    for name in given["metrics"]:
        if name in others:
            raise ValueError(
                f"the metric {name!r} in evaluation.metrics does not fit {what}, which trains here; "
                f"choose of {', '.join(metrics)}"
            )
        if name not in metrics:
            raise ValueError(
                f"evaluation.metrics: there is no {name!r}{did_you_mean(name, metrics)}"
            )
    asked = parts.log_options(config)["metric"]
    known = [JUDGED + name for name in scores.figures_of(given["metrics"])]
    if asked.startswith(JUDGED) and asked not in known:
        raise ValueError(
            f"log.metric = {asked!r} is none of the evaluation's{did_you_mean(asked, known)}"
        )
    return given


def _periodic(
    config: ConfigDict,
    directory: Path,
    given: dict[str, Any],
    subject: Subject,
    mesh: Mesh,
    **more: Any,
) -> Periodic:
    fields = {k: v for k, v in given.items() if k in judging.Asked._fields}
    # Of several processes each would have to see the same files at the same time.
    cache = None if processes.several() else directory / "reference"
    asked = judging.Asked(**fields, **more, cache=cache)
    judge = judging.prepare(asked, subject, mesh)

    def evaluate(params, frozen):
        try:
            figures = judge(params, frozen)
        except judging.Unusable as error:
            raise guards.TrainingStopped(str(error)) from error
        found = {JUDGED + k: v for k, v in figures.items() if isinstance(v, float)}
        return Evaluation(found, {})

    return Periodic(given["every"], evaluate)
