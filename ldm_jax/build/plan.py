"""A run from shapes alone: what its train step and its sampler need, before there is data or a trained autoencoder.

A fine-tuning run reads the config files and tokenizers of what it starts from, and no weights.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ldm_jax import codec
from ldm_jax.build import autoencoder, diffusion, parts, pretrained, sampler, updates, workdir
from ldm_jax.build.sections import section
from ldm_jax.foresee.study import Program
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.pretrained import start
from ldm_jax.tasks import make_sampler
from ldm_jax.training import compiled, diffusion_loss, joined, sharding, step
from ldm_jax.types import Loss, Params

WHAT = ("train", "sample")
SIZES = 6  # of a picture, its crop and its target; see `transforms.sizes`


class Plan(NamedTuple):
    """Shapes of arrays, and what is done with them."""

    loss: Loss
    trained: Params
    frozen: Params
    fields: Mapping[str, Any]  # of one row of a batch
    model: LatentDiffusion | None  # None: an autoencoder
    together: Callable[[Params, Params], tuple[Params, Params]] | None = (
        None  # -> (all parameters, the codec's arrays)
    )


def _shape(shape: Sequence[int], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(shape), dtype)


def plan(config: ConfigDict, first_stage: ConfigDict | None = None) -> Plan:
    """What a config trains; `first_stage` is the config of its autoencoder, where that has no run yet.

    Raises:
      ValueError, FileNotFoundError: one sentence about the config, or about what it starts from.
    """
    kind = workdir.check_config(config)
    picture = _shape(autoencoder.data_shape(config))
    if "init" in config:
        return _pretrained(config, picture)
    if kind == "autoencoder":
        loss, make_arrays = autoencoder.loss(config)
        trained = jax.eval_shape(partial(autoencoder.init, config), jax.random.key(0))
        return Plan(loss, trained, jax.eval_shape(make_arrays), {"x": picture}, None)
    try:
        coder, first_stage = codec_of(config, first_stage)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"codec.run = {config.codec.run!r} holds no run; give the config of the autoencoder: "
            "--first_stage configs/..."
        ) from error
    arrays = {}
    if first_stage is not None:
        shapes = jax.eval_shape(partial(autoencoder.init, first_stage), jax.random.key(0))
        arrays = {"params": shapes["gen"], "scale": _shape(())}
    provided = words(config)
    of = diffusion.assembled(config, coder, provided)
    trained = jax.eval_shape(partial(diffusion.init, config, of, provided), jax.random.key(0))
    rows = diffusion.example(config, of.fields, provided, diffusion.latent_shape(config, coder))
    fields = {k: _shape(v.shape[1:], v.dtype) for k, v in rows.items()}
    objective, drop = diffusion.objective(config, of)
    loss = diffusion_loss.diffusion_loss(of, objective, drop)
    return Plan(loss, trained, arrays, {"x": picture} | fields, of, lambda p, f: (p, f))


def words(config: ConfigDict) -> dict[str, Any]:
    """What a conditioner has to know of a tokenizer that is learnt from the data, which are not looked at."""
    if "tokenizer" not in config:
        return {}
    given = config.tokenizer
    null = (0,) * given.length  # of whatever numbers
    return {"vocab": given.vocab, "length": given.length, "null": null}


def codec_of(
    config: ConfigDict, first_stage: ConfigDict | None = None
) -> tuple[codec.Codec, ConfigDict | None]:
    """The codec, and the config of its autoencoder if it has one: `first_stage`, or that of the run in `codec.run`.

    Raises:
      FileNotFoundError, ValueError: there is no such run, or it is not one of an autoencoder.
    """
    given = section(config.codec, "codec")
    if given["name"] == "identity":
        return codec.identity(), None
    if first_stage is None:
        first_stage = workdir.read_config(given.get("run", ""))
    if workdir.check_config(first_stage) != "autoencoder":
        raise ValueError(
            "the first stage is no config of an autoencoder; give one, such as configs/kl_f8.py"
        )
    return codec.autoencoder(autoencoder.model(first_stage)), first_stage


def _pretrained(config: ConfigDict, picture: Any) -> Plan:
    of = pretrained.opened(config)
    diffusion.latent_shape(config, of.model.codec)  # raises where the pictures' size does not fit
    shapes, trained = start.shapes(of), pretrained.trained_shapes(config, of)
    arrays = {"params": of.components[start.CODEC].shapes, "scale": _shape(())}
    frozen = {"params": {k: v for k, v in shapes.items() if k not in trained}, "arrays": arrays}
    fields = {name: _shape(np.shape(rows(["a"]))[1:], jnp.int32) for name, rows in of.texts.items()}
    if "sizes" in of.model.fields:
        fields["sizes"] = _shape((SIZES,))
    objective, drop = diffusion.objective(config, of.model)
    loss = diffusion_loss.diffusion_loss(of.model, objective, drop, together=tuple(of.texts))

    def together(params, frozen):
        return params | frozen["params"], frozen["arrays"]

    whole = diffusion_loss.with_frozen(loss)
    return Plan(whole, trained, frozen, {"x": picture} | fields, of.model, together)


def program(config: ConfigDict, of: Plan, mesh: Mesh, what: str, rows: int) -> Program:
    """The train step or the sampler for batches of so many rows on a mesh, by the config's layouts.

    Raises:
      ValueError: rows or a size that do not divide over the mesh, rules that fit no parameter, or a sampler of an
        autoencoder.
    """
    if what == "sample" and of.model is None:
        raise ValueError(
            "an autoencoder has no sampler; give --what train, or the config of a second stage"
        )
    optimizer, ema, accumulate = updates.optimizer_of(config)
    sharding.check_batch(rows, mesh, accumulate if what == "train" else 1)
    sharding.check_space(of.fields["x"].shape[:-1], mesh)
    batch = {k: _shape((rows, *v.shape), v.dtype) for k, v in of.fields.items()}
    batch = _laid(batch, sharding.batch_layouts(mesh, batch))
    rules = parts.rules_of(config)
    frozen = _laid(of.frozen, _frozen_layouts(mesh, of.frozen))
    key = jax.eval_shape(lambda: jax.random.key(0))
    everywhere = sharding.replicated(mesh)
    if what == "train":
        state = jax.eval_shape(lambda params: step.init_state(params, optimizer, ema), of.trained)
        layouts = sharding.state_layouts(mesh, rules, state)
        groups = updates.groups_of(config, of.trained)
        taken = step.make_train_step(of.loss, optimizer, ema, accumulate, groups)
        state = _laid(state, layouts)

        def call(params, average, moments, counters, frozen, batch, key):
            given = state.replace(params=params, ema=average, opt_state=moments)
            return taken(given.replace(**counters), frozen, batch, key)

        key = _laid(key, everywhere)

        def lower():  # as train.py does
            whole = (layouts, everywhere), (state, frozen, batch, key)
            return compiled.lowered(sharding.on(mesh, taken), *whole)[0]

        inputs = {
            "parameters": state.params,
            "average": state.ema,
            "optimizer": state.opt_state,
            "counters": {"step": state.step, "skipped": state.skipped},
            "frozen": frozen,
            "batch": batch,
            "key": key,
        }
        options = joined.options(list(mesh.devices.flat), of.trained)
        return Program(call, inputs, (layouts, everywhere), (0, 1, 2, 3), rows, options, lower)
    how = sampler.sampling(config, of.model)
    shape = of.model.codec.shape(of.fields["x"].shape)
    draw = make_sampler(of.model, shape, how)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
    fixed = jax.tree.map(jnp.asarray, (how.points, jnp.float32(how.guidance), how.traced()))

    def call(params, frozen, batch, keys, fixed):
        return draw(*of.together(params, frozen), batch, keys, *fixed).x

    conditions = {k: v for k, v in batch.items() if k != "x"} or {"x": batch["x"]}
    inputs = {
        "parameters": _laid(of.trained, sharding.layouts(mesh, rules, of.trained)),
        "frozen": frozen,
        "conditions": conditions,
        "keys": _laid(keys, sharding.batch_layouts(mesh, keys)),
        "settings": _laid(jax.eval_shape(lambda: fixed), everywhere),
    }
    return Program(call, inputs, None, (), rows)


def _laid(shapes: Any, layouts: Any) -> Any:
    if isinstance(layouts, jax.sharding.Sharding):
        layouts = jax.tree.map(lambda _: layouts, shapes)
    return jax.tree.map(
        lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), shapes, layouts
    )


def _frozen_layouts(mesh: Mesh, frozen: Params) -> Any:
    """As in `pretrained.frozen`: text encoders are spread, all else is on every device."""
    everywhere = jax.tree.map(lambda _: sharding.replicated(mesh), frozen)
    if "arrays" not in frozen:
        return everywhere
    return everywhere | {"params": sharding.layouts(mesh, pretrained.SPREAD, frozen["params"])}
