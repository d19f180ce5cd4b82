"""From a config to a run or a pipeline: the only place that reads configs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from ldm_jax.build import autoencoder, diffusion, parts, pretrained, sampler, weaker, workdir
from ldm_jax.build.latent_moments import latent_statistics
from ldm_jax.build.tasks import Asked, ask
from ldm_jax.build.untrained import conditions
from ldm_jax.build.untrained import pipeline as untrained
from ldm_jax.build.weaker import away_from
from ldm_jax.pipeline import Pipeline
from ldm_jax.tasks import Sampling
from ldm_jax.training.loop import Run
from ldm_jax.types import Batch

__all__ = [
    "Asked",
    "ask",
    "away_from",
    "conditions",
    "examples",
    "labelled",
    "latent_statistics",
    "pipeline",
    "run",
    "sampling",
    "untrained",
    "validation",
]


def run(config: ConfigDict, directory: str | Path) -> Run:
    """A run of either stage in `directory`; everything that a user can get wrong is looked at before any compile.

    Nothing is written before all of it was looked at.

    Raises:
      ValueError, FileNotFoundError: one sentence that names what is wrong and what to do.
    """
    kinds = {"autoencoder": autoencoder.run, "diffusion": diffusion.run}
    kind = workdir.check_config(config)
    start = pretrained.run if "init" in config else kinds[kind]
    return start(config, Path(directory))


def pipeline(directory: str | Path, step: int | None = None, ema: str | None = None) -> Pipeline:
    """The trained model in `directory`, from its `config.json` and a checkpoint's moving average.

    `ema` names one of several averages; the first by default.

    Raises:
      ValueError: the run is not one of a diffusion model, or keeps no such average.
      FileNotFoundError: no run or no checkpoint there.
    """
    config = workdir.read_config(directory)
    kind = workdir.check_config(config)
    if kind != "diffusion":
        raise ValueError(
            f"{directory} holds a run of kind {kind!r}; only a diffusion model can be sampled"
        )
    of = pretrained if "init" in config else diffusion
    return of.pipeline(config, Path(directory), step, ema)


def sampling(
    directory: str | Path,
    of: Pipeline,
    film: bool = False,
    heatmaps: bool = False,
    **override: Any,
) -> Sampling:
    """How the run's config samples, with `override` of its solver, steps, spacing or guidance.

    Raises:
      ValueError: an unknown solver, spacing or guidance ("did you mean"), or a weaker model that does not fit.
      FileNotFoundError: autoguidance by a run or a checkpoint that is not there.
    """

    def opened(run, checkpoint):
        weak = pipeline(run or directory, checkpoint)
        weaker.check(directory, of, run or directory, weak)
        return weak.model, weak.params

    config = workdir.read_config(directory)
    return sampler.sampling(config, of.model, film, heatmaps, opened, **override)


def examples(directory: str | Path, split: str, n: int) -> tuple[np.ndarray, list[str]]:
    """The first `n` pictures [n h w c] in [-1, 1] and captions of another split of the run's data.

    Raises:
      ValueError: there is no such split, fewer examples than `n`, or no captions.
    """
    config = workdir.read_config(directory)
    of = parts.source(config, split=split)
    if "caption" not in of.fields:
        raise ValueError(f"the run in {directory} was trained without captions, which this needs")
    batches = parts.batches(
        config, of, (), batch=n, crop="center", flip=False, shuffle=False, repeat=False
    )
    return batches[0]["x"], batches.captions(0)


def labelled(directory: str | Path, of: Pipeline, n: int) -> tuple[np.ndarray, list[str]]:
    """The first `n` pictures [n h w c] in [-1, 1] of a run's validation data, and their classes by name.

    Raises:
      ValueError: a model that reads no labels, classes without names, or fewer examples than `n`.
    """
    if of.classes is None or "label" not in of.model.fields:
        reads = list(of.model.fields) or "nothing"
        raise ValueError(
            f"the run in {directory} reads {reads}, and this needs classes that have names"
        )
    found = validation(directory, of, n)
    pictures = np.stack([found.picture(i) for i in range(n)])
    return pictures, [of.classes[i] for i in found.conditions()["label"]]


class Validation(NamedTuple):
    """The first examples of a run's validation data; what is a function is read when it is called."""

    name: str
    picture: Callable[[int], np.ndarray]  # [h w c] in [-1, 1]
    captions: Callable[[], list[str]] | None
    conditions: Callable[[], Batch]  # of all of them, for `Pipeline.drawer`


def validation(directory: str | Path, of: Pipeline, n: int) -> Validation:
    """The first `n` examples of a run's validation data.

    Raises:
      ValueError: fewer examples than `n`.
    """
    config = workdir.read_config(directory)
    source = parts.source(config, **parts.data(config)["validation"])
    if n > len(source):
        raise ValueError(f"{source.name} has {len(source)} examples, not {n}; give a smaller --n")
    made = (*of.texts, *of.common, "masked")  # by the pipeline, and by the model's codec
    own = [f for f in of.model.fields if f not in made]
    fixed = dict(crop="center", flip=False, shuffle=False, repeat=False)
    one = parts.batches(config, source, own, batch=1, **fixed)

    def captions():
        return [one.captions(i)[0] for i in range(n)]

    def conditions():
        if not of.model.fields:
            return of.unconditional(n)
        rows = [one[i] for i in range(n)] if own else []
        shown = ("x",) if "masked" in of.model.fields else ()
        made = {name: np.concatenate([row[name] for row in rows]) for name in (*own, *shown)}
        return made | (of.prompts(captions()) if of.texts else {})

    told = captions if "caption" in source.fields else None
    return Validation(source.name, lambda i: one[i]["x"][0], told, conditions)
