"""Stage 1: the run of an autoencoder."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ldm_jax import codec
from ldm_jax.build import buckets, judged, parts, updates, workdir
from ldm_jax.build.sections import accepted, checked, did_you_mean, make, section
from ldm_jax.models import features, lpips, vq
from ldm_jax.pipeline import FirstStage
from ldm_jax.training import (
    autoencoder_loss,
    bottleneck,
    checkpoints,
    evaluation,
    loop,
    manifest,
    sharding,
)
from ldm_jax.types import Loss, Params
from ldm_jax.weights import lpips as lpips_files

FEATURES = dict(weight=float, random_init=int)  # of a perceptual section, what is not the network's
LPIPS = dict(name=str, weight=float, file=str)
LPIPS_LEAST = 16  # pixels: VGG16 halves four times
START = dict(run=str, checkpoint=int)


def model(config: ConfigDict) -> nn.Module:
    return parts.make_section("models", config.model, "model")


def discriminator(config: ConfigDict) -> nn.Module | None:
    if "discriminator" not in config:
        return None
    return parts.make_section("models", config.discriminator, "discriminator")


def data_shape(config: ConfigDict, channels: int = 3) -> tuple[int, ...]:
    """Spatial shape and channels of the data."""
    size = parts.data(config)["size"]
    return (*(size if isinstance(size, tuple) else (size, size)), channels)


def init(config: ConfigDict, key: jax.Array) -> Params:
    """Fresh parameters {"gen": ..., "disc": ... if there is a discriminator}."""
    for_gen, for_disc, for_sample = jax.random.split(key, 3)
    x = jnp.zeros((1, *data_shape(config)))
    params = {"gen": model(config).init(for_gen, x, for_sample)["params"]}
    judge = discriminator(config)
    if judge is not None:
        params["disc"] = judge.init(for_disc, x)["params"]
    return params


def _perceptual(config: ConfigDict) -> tuple[dict[str, Any], Callable[[], Params]]:
    """The loss's arguments for the perceptual term, and what makes the arrays of its feature network.

    LPIPS without a file of weights is off, which is said.
    """
    if "perceptual" not in config:
        return {}, dict
    if section(config.perceptual, "perceptual")["name"] == "lpips.LPIPS":
        return _lpips(config)
    given = section(config.perceptual, "perceptual")
    own = {k: given.pop(k) for k in FEATURES if k in given}
    checked("perceptual", own, FEATURES, needed=FEATURES)
    network = make("models", given.pop("name"), **given)

    def make_arrays():
        key = jax.random.key(own["random_init"])
        return network.init(key, jnp.zeros((1, *data_shape(config))))

    def distance(arrays, x, y):
        return features.perceptual_distance(lambda x: network.apply(arrays, x), x, y)

    return dict(perceptual=distance, perceptual_weight=float(own["weight"])), make_arrays


def _lpips(config: ConfigDict) -> tuple[dict[str, Any], Callable[[], Params]]:
    given = checked("perceptual", config.perceptual, LPIPS)
    if not given.get("file"):
        logging.warning(
            "the perceptual term is off: perceptual.file names no weights of LPIPS; see docs/guide.md"
        )
        return {}, dict
    if min(data_shape(config)[:-1]) < LPIPS_LEAST:
        raise ValueError(
            f"LPIPS needs pictures of at least {LPIPS_LEAST} pixels a side, and data.size is {config.data.size}"
        )
    weight = float(given.get("weight", 1.0))
    load = functools.partial(lpips_files.load, given["file"].split(","))
    return dict(perceptual=lpips.LPIPS().apply, perceptual_weight=weight), load


def _bottleneck(config: ConfigDict, of: nn.Module) -> tuple[bottleneck.Bottleneck, dict[str, Any]]:
    """What is between encoder and decoder, and the entries of the objective that are of the rest.

    Raises:
      ValueError: an entry of the objective that is unknown, or of another kind of model.
    """
    objective = section(config.objective, "objective")
    objective.pop("name")
    codes = isinstance(of, vq.VQAutoencoder)
    name = f"bottleneck.{'quantized' if codes else 'gaussian'}"
    more = {"rule": updates.codebook_rule(config)} if codes else {}
    own = set(accepted("training", name)) - {"model", "rule"}
    if codes and of.levels:
        own = set()  # nothing is learnt
    elsewhere = {"bottleneck", "discriminator", "perceptual", "perceptual_weight"}
    rest = set(accepted("training", "autoencoder_loss.autoencoder_loss")) - elsewhere
    for key in objective:
        if key not in own | rest:
            raise ValueError(
                f"objective.{key} is unknown for {config.model.name}{did_you_mean(key, own | rest)}"
            )
    given = {k: v for k, v in objective.items() if k in own}
    made = make("training", name, model=of, **more, **given)
    return made, {k: v for k, v in objective.items() if k in rest}


def loss(config: ConfigDict) -> tuple[Loss, Callable[[], Params]]:
    """The loss by the config's objective, and what makes the arrays that it uses and does not train."""
    options, make_arrays = _perceptual(config)
    between, objective = _bottleneck(config, model(config))
    how = objective.get("normalization", "sum")
    if how not in autoencoder_loss.NORMALIZATIONS:
        told = did_you_mean(str(how), autoencoder_loss.NORMALIZATIONS)
        raise ValueError(f"objective.normalization = {how!r} is unknown{told}")
    made = make(
        "training",
        "autoencoder_loss.autoencoder_loss",
        bottleneck=between,
        discriminator=discriminator(config),
        **objective,
        **options,
    )
    return updates.of_trained(config, made), make_arrays


def _start(config: ConfigDict, mesh: Mesh) -> Callable[[Any], Params]:
    """What reads the parameters that a new run starts from: the moving average of another run's.

    A discriminator that the other run has not, or has in another form, starts afresh.

    Raises:
      FileNotFoundError, ValueError: no such run, or one of another autoencoder.
    """
    given = checked("start", config.start, START, needed=("run",))
    theirs = workdir.read_config(given["run"])
    if workdir.check_config(theirs) != "autoencoder":
        raise ValueError(
            f"start.run = {given['run']!r} is not the run of an autoencoder; give the workdir of one"
        )
    key = jax.random.key(config.seed)
    ours, there = (jax.eval_shape(functools.partial(init, c), key) for c in (config, theirs))
    if ours["gen"] != there["gen"]:
        raise ValueError(
            f"the autoencoder of {given['run']} has other parameters than config.model; give model the settings "
            "of that run"
        )
    everywhere = jax.tree.map(lambda _: sharding.replicated(mesh), there)
    at = given.get("checkpoint")

    def load(layouts):
        params, step = checkpoints.load_ema(
            given["run"], there, everywhere, at, updates.average_of(theirs)
        )
        logging.warning("starts from step %d of %s", step, given["run"])
        if "disc" in ours and ours["disc"] != there.get("disc"):
            fresh = jax.jit(functools.partial(init, config), out_shardings=layouts)(key)
            params = params | {"disc": fresh["disc"]}
        return jax.device_put({k: params[k] for k in ours}, layouts)

    return load


def run(config: ConfigDict, directory: Path) -> loop.Run:
    mesh = parts.mesh(config)
    if parts.data(config).get("cached"):
        raise ValueError(
            "data.cached is for diffusion models: an autoencoder is trained on pictures; leave it out"
        )
    source = parts.source(config)
    workdir.compare(config, source, directory)
    batches = buckets.batches(config, source, fields=())
    kept = parts.kept_step(config, mesh, source)
    begun = bool(manifest.steps(Path(directory) / checkpoints.FOLDER))
    load = _start(config, mesh) if "start" in config and not begun else None
    of_config, make_arrays = loss(config)
    fixed = parts.validation_batches(config, fields=())
    shown = parts.log_options(config)["samples"]
    network = model(config)
    made = parts.run(
        config,
        mesh=mesh,
        init=lambda key: init(config, key),
        loss=of_config,
        frozen=jax.device_put(make_arrays(), sharding.replicated(mesh)),
        batches=batches.iterate,
        shapes=buckets.shapes(batches),
        told=buckets.told(batches),
        evaluate=evaluation.autoencoder(network, mesh, fixed, shown),
        example=fixed[0],
        load=load,
        kept=kept,
        judged=judged.autoencoder(config, directory, network, mesh),
    )
    workdir.claim(config, source, directory)
    return made


def loaded(
    config: ConfigDict, directory: str | Path, mesh: Mesh, step: int | None, ema: str | None = None
) -> tuple[codec.Codec, Params, int]:
    """The codec of a run's autoencoder, its arrays (the scale still 1), and the step of the checkpoint.

    Raises:
      FileNotFoundError, ValueError: no checkpoint, not that of this step, or no average of this name.
    """
    shapes = jax.eval_shape(functools.partial(init, config), jax.random.key(0))
    everywhere = jax.tree.map(lambda _: sharding.replicated(mesh), shapes)
    average = updates.average_of(config, ema)
    params, at = checkpoints.load_ema(directory, shapes, everywhere, step, average)
    return codec.autoencoder(model(config)), {"params": params["gen"], "scale": jnp.ones(())}, at


def first_stage(
    config: ConfigDict, directory: Path, step: int | None = None, ema: str | None = None
) -> FirstStage:
    mesh = sharding.make_mesh()
    coder, arrays, at = loaded(config, directory, mesh, step, ema)
    return FirstStage(coder, arrays, mesh, at)
