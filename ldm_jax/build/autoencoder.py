"""Stage 1: the run of an autoencoder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from ldm_jax.build import buckets, parts, workdir
from ldm_jax.build.sections import checked, make, section
from ldm_jax.models import features
from ldm_jax.training import evaluation, loop, sharding
from ldm_jax.types import Loss, Params

PERCEPTUAL = dict(weight=float, random_init=int)


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
    """The loss's arguments for the perceptual term, and what makes the arrays of its feature network."""
    if "perceptual" not in config:
        return {}, dict
    given = section(config.perceptual, "perceptual")
    own = {k: given.pop(k) for k in PERCEPTUAL if k in given}
    checked("perceptual", own, PERCEPTUAL, needed=PERCEPTUAL)
    network = make("models", given.pop("name"), **given)

    def make_arrays():
        key = jax.random.key(own["random_init"])
        return network.init(key, jnp.zeros((1, *data_shape(config))))

    def distance(arrays, x, y):
        return features.perceptual_distance(lambda x: network.apply(arrays, x), x, y)

    return dict(perceptual=distance, perceptual_weight=float(own["weight"])), make_arrays


def loss(config: ConfigDict) -> tuple[Loss, Callable[[], Params]]:
    """The loss by the config's objective, and what makes the arrays that it uses and does not train."""
    options, make_arrays = _perceptual(config)
    objective = section(config.objective, "objective")
    objective.pop("name")
    made = make(
        "training",
        "autoencoder_loss.autoencoder_loss",
        model=model(config),
        discriminator=discriminator(config),
        **objective,
        **options,
    )
    return made, make_arrays


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
    of_config, make_arrays = loss(config)
    fixed = parts.validation_batches(config, fields=())
    shown = parts.log_options(config)["samples"]
    made = parts.run(
        config,
        mesh=mesh,
        init=lambda key: init(config, key),
        loss=of_config,
        frozen=jax.device_put(make_arrays(), sharding.replicated(mesh)),
        batches=batches.iterate,
        shapes=buckets.shapes(batches),
        told=buckets.told(batches),
        evaluate=evaluation.autoencoder(model(config), mesh, fixed, shown),
        example=fixed[0],
        kept=kept,
    )
    workdir.claim(config, source, directory)
    return made
