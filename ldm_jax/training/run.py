"""What a run consists of: the values that `build` makes from a config and that `loop` trains with."""

from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from ldm_jax.training import checkpoints, compiled, norms
from ldm_jax.training.averages import Averages
from ldm_jax.training.guards import Guards
from ldm_jax.types import Loss, Params


class Evaluation(NamedTuple):
    scalars: dict[str, float]
    images: dict[str, np.ndarray]


class Periodic(NamedTuple):
    """What is measured every so many steps."""

    every: int
    evaluate: Callable[[Params, Params], Evaluation]  # (moving average, frozen)


class Run(NamedTuple):
    """What a run consists of; `build` makes it from a config."""

    seed: int
    steps: int
    mesh: Mesh
    rules: Any  # parameter names -> layouts
    init: Callable[[jax.Array], Params]
    loss: Loss
    optimizer: optax.GradientTransformation
    frozen: Params
    batches: Callable[[int], Generator[dict[str, np.ndarray]]]  # from a step on
    evaluate: Callable[[Params, Params], Evaluation]  # (moving average, frozen)
    ema: Averages
    accumulate: int
    log_every: int
    eval_every: int
    save_every: int
    keep: int | checkpoints.Keep
    max_skipped: int
    # Parameters to start from, born with these layouts; `init` then says their shapes alone.
    load: Callable[[Any], Params] | None = None
    kept: compiled.Kept | None = None  # the compiled step of an earlier start
    guards: Guards = Guards()
    batch: int = 1  # samples of a step
    operations: Callable[[], int] | None = None  # counts those of a step
    wandb: str = ""  # a project of Weights & Biases
    shapes: Sequence[dict[str, Any]] = ()  # of the batches, where these have several
    told: str = ""  # of the data
    groups: norms.Rules | bool = False  # of layers, whose gradients are measured
    judged: Periodic | None = None  # beside `evaluate`: metrics of many samples or reconstructions
