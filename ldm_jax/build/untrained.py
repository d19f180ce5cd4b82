"""The model of a config before any training, with random parameters: to measure it."""

import functools
import importlib.util
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ldm_jax import codec
from ldm_jax.build import autoencoder, diffusion, workdir
from ldm_jax.build.sections import section
from ldm_jax.pipeline import Pipeline
from ldm_jax.training import sharding
from ldm_jax.types import Batch, Params


def pipeline(path: str | Path) -> Pipeline:
    """The model of a config file; of the run of its autoencoder only the config is needed.

    Raises:
      FileNotFoundError: no such file, or no run of the autoencoder.
      ValueError: not the config of a diffusion model of one's own, or one that cannot be built without its data.
    """
    config = read(path)
    if workdir.check_config(config) != "diffusion" or "init" in config:
        raise ValueError(
            f"{path} is no config of a diffusion model of its own; of pretrained weights give the folder itself"
        )
    coder, arrays = _codec(config)
    provided = _words(config)
    of = diffusion.assembled(config, coder, provided)
    init = functools.partial(diffusion.init, config, of, provided)
    return Pipeline(
        model=of,
        params=jax.jit(init)(jax.random.key(0)),
        arrays=arrays,
        shape=diffusion.latent_shape(config, coder),
        mesh=sharding.make_mesh(),
        step=0,
        config_hash=workdir.config_hash(config),
    )


def conditions(path: str | Path, of: Pipeline) -> Batch:
    """A batch of one, of zeros, of what the model of a config file, or of a run, is conditioned on."""
    config = read(path) if Path(path).is_file() else workdir.read_config(path)
    made = diffusion.example(config, of.model.fields, _words(config), of.shape)
    return made or {"_": jnp.zeros(1, jnp.int32)}


def read(path: str | Path) -> ConfigDict:
    """What `get_config` of a file gives.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a file without that function.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no config file {str(path)!r}; see the folder configs")
    spec = importlib.util.spec_from_file_location("config_to_measure", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ValueError(f"{path} has no function get_config; give a file such as configs/demo.py")
    return module.get_config()


def _words(config: ConfigDict) -> dict[str, Any]:
    """What is known of a tokenizer that is learnt from the data, which are not looked at."""
    if "tokenizer" not in config:
        return {}
    return {"vocab": config.tokenizer.vocab, "length": config.tokenizer.length, "null": ()}


def _codec(config: ConfigDict) -> tuple[codec.Codec, Params]:
    given: dict[str, Any] = section(config.codec, "codec")
    if given["name"] == "identity":
        return codec.identity(), {}
    theirs = workdir.read_config(given.get("run", ""))
    params = jax.jit(functools.partial(autoencoder.init, theirs))(jax.random.key(1))["gen"]
    return codec.autoencoder(autoencoder.model(theirs)), {"params": params, "scale": jnp.ones(())}
