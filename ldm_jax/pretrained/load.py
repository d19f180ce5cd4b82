"""From files to a pipeline."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ldm_jax import tree
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.pretrained import assembly, components, kinds, single_files, sources
from ldm_jax.pretrained.controlnets import KIND as CONTROLNET
from ldm_jax.pretrained.controlnets import Given
from ldm_jax.pretrained.controlnets import open_any as open_controlnet
from ldm_jax.pretrained.pipeline import Pretrained
from ldm_jax.training import sharding
from ldm_jax.types import Params

DTYPES = ("float32", "bfloat16", "float16")
REPLICATE = ((".*", "replicate"),)


def from_pretrained(
    path: str | Path,
    *,
    dtype: Any = "float32",
    variant: str | None = None,
    config: str | Path | Mapping[str, Any] | None = None,
    tokenizers: Sequence[str | Path] = (),
    ema: bool = False,
    controlnets: Sequence[Given] = (),
    mesh: Mesh | None = None,
    rules: Sequence[tuple[str, Any]] = REPLICATE,
    revision: str | None = None,
) -> Pretrained:
    """A Stable-Diffusion-class model, or one of latent diffusion's first, ready for use.

    Args:
      path: a folder that diffusers wrote; a single file in the original layout (`.safetensors`, or `.ckpt`, whose
        pickle may make tensors and nothing else); or, with `huggingface_hub` installed, the name of a repository,
        "owner/name", whose JSON, text and safetensors files of one `revision` are fetched.
      dtype: of parameters and computation: "float32", "bfloat16" or "float16".
      variant: of the files' names in a folder, such as "fp16".
      config: for a single file, what its shapes do not tell: a folder of diffusers (also for the tokenizers), the
        original YAML file, or {component: settings in diffusers' words}.
      tokenizers: for a single file, the folders of its tokenizers.
      ema: of a single file that has it, the moving average of the U-Net's weights.
      controlnets: ControlNets, for which a verb's `hints` are, after those that `path` itself has: folders with a
        config.json and safetensors, or single files in the original layout or diffusers'; (file, settings in diffusers'
        words) says what shapes do not tell.
      mesh, rules: where the parameters of each network live (see `training.sharding`); by default all on every device.

    Raises:
      FileNotFoundError, ValueError: one sentence that says what is missing or does not fit; nothing is half-loaded.
    """
    if (dtype if isinstance(dtype, str) else jnp.dtype(dtype).name) not in DTYPES:
        raise ValueError(f"dtype={dtype} is not among {DTYPES}")
    dtype = jnp.dtype(dtype)
    source = _opened(path, variant, config, tokenizers, ema, revision)
    made = {
        name: components.make(kind, settings, dtype)
        for name, (kind, settings) in source.networks.items()
    }
    if source.index.get("_class_name") in kinds.UNSCALED:
        made["vae"] = dataclasses.replace(made["vae"], scale=1.0)
    steering = [*source.steering, *(open_controlnet(net, variant) for net in controlnets)]
    nets = tuple(components.make(CONTROLNET, net.config, dtype) for net in steering)
    model = assembly.assemble(made, source.tokenizers, source.index, source.schedulers["scheduler"])
    stored = [source.tensors(name, component) for name, component in made.items()]
    stored += [of.tensors(net) for of, net in zip(steering, nets, strict=True)]
    every = [*made.values(), *nets]
    for component, given in zip(every, stored, strict=True):
        component.check(given)
    _check_rules(rules, every)
    mesh = sharding.make_mesh() if mesh is None else mesh
    loaded = [_load(*pair, dtype, mesh, rules) for pair in zip(every, stored, strict=True)]
    params = dict(zip(made, loaded, strict=False))
    pipe = bundle(model, params, made, source, mesh)
    if not nets:
        return pipe
    controls = {"controls": tuple(loaded[len(made) :])}
    return dataclasses.replace(pipe, params=pipe.params | controls, controlnets=nets)


def _opened(
    path: str | Path,
    variant: str | None = None,
    config: str | Path | Mapping[str, Any] | None = None,
    tokenizers: Sequence[str | Path] = (),
    ema: bool = False,
    revision: str | None = None,
) -> sources.Source:
    """A folder, a file or a repository; see `from_pretrained`."""
    path = sources.local(path, revision)
    if not path.is_dir():
        return single_files.open_file(path, config, tokenizers, ema)
    if config is not None or tokenizers or ema:
        raise ValueError(
            f"{path} is a folder, which has its own configs and tokenizers and no ema; leave them out"
        )
    return sources.open_folder(path, variant)


def _check_rules(rules: Sequence[tuple[str, Any]], every: Sequence[components.Component]) -> None:
    """Raises: ValueError: a rule that matches no parameter of any network (a final ".*" may be idle)."""
    names = [name for component in every for name in tree.names(component.shapes)]
    dead = [p for p, _ in rules if p != ".*" and not any(re.fullmatch(p, n) for n in names)]
    if dead:
        raise ValueError(
            f"the rules {dead} match no parameter; parameters are named like {names[:3]}"
        )


def _load(
    component: components.Component,
    given: components.Tensors,
    dtype: Any,
    mesh: Mesh,
    rules: Sequence[tuple[str, Any]],
) -> Params:
    names = tree.names(component.shapes)
    # The rules of one network need not match another's leaves.
    fitting = [(p, v) for p, v in rules if any(re.fullmatch(p, name) for name in names)]
    return component.load(given, dtype, sharding.layouts(mesh, fitting, component.shapes))


def bundle(
    model: LatentDiffusion,
    params: Mapping[str, Params],
    made: Mapping[str, components.Component],
    source: sources.Source,
    mesh: Mesh,
) -> Pretrained:
    """The pipeline of loaded parameters, {component: params}."""
    encoders = assembly.encoders(model.conditioner, made)
    condition = {key: params[name] for key, name in encoders.items()}
    scale = jax.device_put(jnp.float32(made["vae"].scale), sharding.replicated(mesh))
    conditioned = model.conditioner is not None
    return Pretrained(
        model=model,
        params={"network": params["unet"]} | ({"conditioner": condition} if conditioned else {}),
        arrays={"params": params["vae"], "scale": scale},
        components=made,
        tokenizers=source.tokenizers,
        index=source.index,
        schedulers=source.schedulers,
        mesh=mesh,
        vision={name: params[name] for name in kinds.VISION if name in params},
        processors=source.processors,
    )
