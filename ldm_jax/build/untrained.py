"""The model of a config before any training, with random parameters: to measure it."""

import functools
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ldm_jax.build import autoencoder, diffusion, plan, workdir
from ldm_jax.pipeline import Pipeline
from ldm_jax.training import sharding
from ldm_jax.types import Batch


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
    coder, first_stage = plan.codec_of(config)
    provided, arrays = plan.words(config), {}
    if first_stage is not None:
        drawn = jax.jit(functools.partial(autoencoder.init, first_stage))(jax.random.key(1))
        arrays = {"params": drawn["gen"], "scale": jnp.ones(())}
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
    made = diffusion.example(config, of.model.fields, plan.words(config), of.shape)
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
