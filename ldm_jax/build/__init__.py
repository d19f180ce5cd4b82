"""From a config to a run or a pipeline: the only place that reads configs."""

from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ldm_jax.build import (
    autoencoder,
    diffusion,
    held_out,
    parts,
    pretrained,
    sampler,
    weaker,
    workdir,
)
from ldm_jax.build.extras import embedding
from ldm_jax.build.held_out import Validation
from ldm_jax.build.latent_moments import latent_statistics
from ldm_jax.build.tasks import Asked, ask
from ldm_jax.build.untrained import conditions
from ldm_jax.build.untrained import pipeline as untrained
from ldm_jax.build.weaker import away_from
from ldm_jax.pipeline import FirstStage, Pipeline
from ldm_jax.tasks import Sampling
from ldm_jax.training.loop import Run

__all__ = [
    "Asked",
    "ask",
    "away_from",
    "conditions",
    "embedding",
    "examples",
    "first_stage",
    "kind",
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


def kind(directory: str | Path) -> str:
    """Which kind of run a directory holds: "autoencoder" or "diffusion".

    Raises:
      FileNotFoundError: it holds none.
    """
    return workdir.check_config(workdir.read_config(directory))


def first_stage(
    directory: str | Path, step: int | None = None, ema: str | None = None
) -> FirstStage:
    """The trained autoencoder in `directory`; `ema` as in `pipeline`.

    Raises:
      ValueError, FileNotFoundError: as `pipeline`.
    """
    config = workdir.read_config(directory)
    if workdir.check_config(config) != "autoencoder":
        raise ValueError(f"{directory} holds no run of an autoencoder; give the workdir of one")
    return autoencoder.first_stage(config, Path(directory), step, ema)


def validation(directory: str | Path, n: int, of: Pipeline | None = None) -> Validation:
    """The first `n` examples of a run's validation data, see `held_out.validation`.

    Raises:
      ValueError: fewer examples than `n`.
    """
    return held_out.validation(workdir.read_config(directory), n, of)
