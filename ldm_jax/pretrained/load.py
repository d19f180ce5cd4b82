"""From files to a pipeline."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ldm_jax import codec, conditioners, tree
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.models import text
from ldm_jax.pretrained import components, inputs, kinds, sources
from ldm_jax.pretrained.pipeline import Pretrained
from ldm_jax.training import sharding
from ldm_jax.types import Params
from ldm_jax.weights import folder, scheduler

DTYPES = ("float32", "bfloat16", "float16")
REPLICATE = ((".*", "replicate"),)
AESTHETIC_NULL = 2.5  # the refiner's score where guidance leads away from
# The same for equal networks, so that models of one structure share their compiled programs.
_codec = functools.lru_cache(maxsize=8)(codec.autoencoder)


def from_pretrained(
    path: str | Path,
    *,
    dtype: Any = "float32",
    variant: str | None = None,
    config: str | Path | Mapping[str, Any] | None = None,
    tokenizers: Sequence[str | Path] = (),
    ema: bool = False,
    controlnets: Sequence[str | Path] = (),
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
      controlnets: folders of ControlNets, each with a config.json and safetensors; a verb's `hints` are for them.
      mesh, rules: where the parameters of each network live (see `training.sharding`); by default all on every device.

    Raises:
      FileNotFoundError, ValueError: one sentence that says what is missing or does not fit; nothing is half-loaded.
    """
    if (dtype if isinstance(dtype, str) else jnp.dtype(dtype).name) not in DTYPES:
        raise ValueError(f"dtype={dtype} is not among {DTYPES}")
    dtype = jnp.dtype(dtype)
    source = sources.open_any(path, variant, config, tokenizers, ema, revision)
    made = {
        name: components.make(kind, settings, dtype)
        for name, (kind, settings) in source.networks.items()
    }
    nets = tuple(
        components.make(
            "ControlNetModel", folder.read_json(Path(net) / "config.json", "a ControlNet"), dtype
        )
        for net in controlnets
    )
    model = assemble(made, source.tokenizers, source.index, source.schedulers["scheduler"])
    stored = [source.tensors(name, component) for name, component in made.items()]
    for net, folder_ in zip(nets, controlnets, strict=True):
        stored.append(net.stored(folder.weights(Path(folder_), net.stem, variant)))
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
    steering = {"controls": tuple(loaded[len(made) :])}
    return dataclasses.replace(pipe, params=pipe.params | steering, controlnets=nets)


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


def assemble(
    made: Mapping[str, components.Component],
    tokenizers: Mapping[str, Callable[[Sequence[str]], Any]],  # texts -> rows of ids
    index: Mapping[str, Any],
    noise: Mapping[str, Any],
) -> LatentDiffusion:
    """The model of these networks; `noise` is a scheduler's config.

    Raises:
      ValueError: text encoders and tokenizers that do not belong together, or a scheduler that we do not know.
    """
    path, target = scheduler.path_and_target(noise)
    return LatentDiffusion(
        network=made["unet"].module,
        conditioner=_conditioner(made, tokenizers, index),
        codec=_codec(made["vae"].module),
        path=path,
        target=target,
    )


def _conditioner(made, tokenizers, index) -> Any:
    texts = [name for name in sources.TEXTS if name in made]
    pairs = [(name, name.replace("text_encoder", "tokenizer")) for name in texts]
    lacking = [tokenizer for _, tokenizer in pairs if tokenizer not in tokenizers]
    if lacking:
        raise ValueError(f"the model has {texts} and lacks {lacking}; add the tokenizers' folders")
    sees = "image_encoder" in made
    if not texts:
        dtype = made["unet"].module.dtype
        return conditioners.Vector(inputs.IMAGE, into="tokens", dtype=dtype) if sees else None
    encoders = tuple(made[name].module for name, _ in pairs)
    null = tuple(tuple(map(int, tokenizers[name]([""])[0])) for _, name in pairs)
    network = made["unet"].module
    if isinstance(encoders[0], text.TextTransformer):
        return _text(encoders[0], null[0])
    if sees:
        return conditioners.Clip(encoders[0], null[0], vector=inputs.IMAGE)
    if (texts == ["text_encoder"] and not network.vector) or network.vector_from == "table":
        return conditioners.Clip(encoders[0], null[0])
    return conditioners.ClipPair(
        encoders,
        null,
        zero_null=bool(index.get("force_zeros_for_empty_prompt", True)),
        null_sizes=(None,) * 4 + (AESTHETIC_NULL,)
        if index.get("requires_aesthetics_score")
        else (),
    )


def _text(encoder: text.TextTransformer, null: tuple[int, ...]) -> conditioners.Text:
    """The conditioner that makes this encoder itself."""
    settings = ("vocab", "width", "layers", "length", "heads", "head_dim", "dtype")
    return conditioners.Text(**{name: getattr(encoder, name) for name in settings}, null=null)


def bundle(
    model: LatentDiffusion,
    params: Mapping[str, Params],
    made: Mapping[str, components.Component],
    source: sources.Source,
    mesh: Mesh,
) -> Pretrained:
    """The pipeline of loaded parameters, {component: params}."""
    encoders = [params[name] for name in sources.TEXTS if name in params]
    if isinstance(model.conditioner, conditioners.ClipPair):
        condition = {f"encoders_{i}": p for i, p in enumerate(encoders)}
    else:
        condition = {"encoder": encoders[0]} if encoders else {}
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
