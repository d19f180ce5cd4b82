"""From files to a pipeline: a folder of diffusers, or the name of one at Hugging Face."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import Mesh

from ldm_jax import codec, conditioners, tree
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.pretrained import components
from ldm_jax.pretrained.pipeline import Pretrained
from ldm_jax.training import sharding
from ldm_jax.weights import autoencoder, folder, prompts, scheduler

DTYPES = ("float32", "bfloat16", "float16")
REPLICATE = ((".*", "replicate"),)
AESTHETIC_NULL = 2.5  # the refiner's score where guidance leads away from
TEXTS = ("text_encoder", "text_encoder_2")
TOKENIZERS = ("tokenizer", "tokenizer_2")
SCHEDULERS = ("scheduler", "low_res_scheduler")
# What a folder may have and sampling does not need.
UNUSED = {
    "safety_checker": "images are not checked",
    "feature_extractor": None,
    "depth_estimator": "give the depth to `depth_to_image`",
    "image_encoder": None,
}


def from_pretrained(
    path: str | Path,
    *,
    dtype: Any = "float32",
    variant: str | None = None,
    mesh: Mesh | None = None,
    rules: Sequence[tuple[str, Any]] = REPLICATE,
    controlnets: Sequence[str | Path] = (),
    revision: str | None = None,
) -> Pretrained:
    """A Stable-Diffusion-class model, ready for use.

    Args:
      path: a folder that diffusers wrote, or (with `huggingface_hub` installed) the name of a repository, "owner/name",
        whose JSON, text and safetensors files of one `revision` are fetched.
      dtype: of parameters and computation: "float32", "bfloat16" or "float16".
      variant: of the files' names, such as "fp16".
      controlnets: folders of ControlNets, each with a config.json and safetensors; a verb's `hints` are for them.
      mesh, rules: where the parameters of each network live (see `training.sharding`); by default all on every device.

    Raises:
      FileNotFoundError, ValueError: one sentence that says what is missing or does not fit; nothing is half-loaded.
    """
    if (dtype if isinstance(dtype, str) else jnp.dtype(dtype).name) not in DTYPES:
        raise ValueError(f"dtype={dtype} is not among {DTYPES}")
    dtype = jnp.dtype(dtype)
    opened = folder.open_folder(_local(path, revision))
    mesh = sharding.make_mesh() if mesh is None else mesh
    unknown = sorted(
        opened.parts.keys() - {"unet", "vae", *SCHEDULERS, *TEXTS, *TOKENIZERS, *UNUSED}
    )
    missing = [name for name in ("unet", "vae", "scheduler") if name not in opened.parts]
    if unknown or missing:
        raise ValueError(
            f"{path} is a {opened.index.get('_class_name')}: "
            + "; ".join(
                [f"the component {name!r} is missing" for name in missing]
                + [f"the component {name!r} is not known here" for name in unknown]
            )
        )
    for name in sorted(opened.parts.keys() & UNUSED.keys()):
        if UNUSED[name]:
            logging.warning("%s: its %s is not used; %s", path, name, UNUSED[name])
    made = {
        name: components.make(opened.parts[name].kind, opened.parts[name].config, dtype)
        for name in ("unet", "vae", *TEXTS)
        if name in opened.parts
    }
    tokenizers = {
        name: prompts.load(opened.parts[name].folder) for name in TOKENIZERS if name in opened.parts
    }
    schedulers = {n: opened.parts[n].config for n in SCHEDULERS if n in opened.parts}
    nets = tuple(
        components.make(
            "ControlNetModel", folder.read_json(Path(net) / "config.json", "a ControlNet"), dtype
        )
        for net in controlnets
    )
    model = assemble(made, tokenizers, opened.index, schedulers["scheduler"])
    stored = {
        name: folder.weights(opened.parts[name].folder, component.stem, variant)
        for name, component in made.items()
    }
    steering = [
        folder.weights(Path(path), net.stem, variant)
        for path, net in zip(controlnets, nets, strict=True)
    ]

    def load(component, tensors):
        layouts = sharding.layouts(mesh, _fitting(rules, component.shapes), component.shapes)
        return component.load(tensors, dtype, layouts)

    params = {name: load(component, stored[name]) for name, component in made.items()}
    pipe = bundle(model, params, made, tokenizers, opened.index, schedulers, mesh)
    if not nets:
        return pipe
    steered = tuple(map(load, nets, steering))
    return dataclasses.replace(pipe, params=pipe.params | {"controls": steered}, controlnets=nets)


def _fitting(rules: Sequence[tuple[str, Any]], shapes: Any) -> list[tuple[str, Any]]:
    """The rules that match something: those of one network need not match another's."""
    names = tree.names(shapes)
    return [(p, v) for p, v in rules if any(re.fullmatch(p, name) for name in names)]


def _local(path: str | Path, revision: str | None) -> Path:
    """The folder, fetched first if `path` names a repository.

    Raises:
      FileNotFoundError: neither a folder nor the name of a repository.
      ValueError: a repository without a revision, or without the library that fetches it.
    """
    if Path(path).exists():
        return Path(path)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(path)):
        raise FileNotFoundError(f"there is no folder {path}")
    if revision is None:
        raise ValueError(
            f"there is no folder {path}; to fetch the repository of this name give a `revision` (a commit), "
            "so that the same weights come tomorrow"
        )
    try:
        import huggingface_hub
    except ImportError as error:
        raise ValueError(
            f"there is no folder {path}, and to fetch a repository huggingface_hub must be installed: "
            "pip install huggingface_hub"
        ) from error
    patterns = ["*.json", "*.txt", "*.safetensors"]
    return Path(
        huggingface_hub.snapshot_download(str(path), revision=revision, allow_patterns=patterns)
    )


def assemble(
    made: Mapping[str, components.Component],
    tokenizers: Mapping[str, prompts.Tokenizer],
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
        codec=codec.autoencoder(made["vae"].module),
        path=path,
        target=target,
    )


def _conditioner(made, tokenizers, index) -> Any:
    texts = [name for name in TEXTS if name in made]
    pairs = [(name, name.replace("text_encoder", "tokenizer")) for name in texts]
    lacking = [tokenizer for _, tokenizer in pairs if tokenizer not in tokenizers]
    if lacking:
        raise ValueError(f"the model has {texts} and lacks {lacking}; add the tokenizers' folders")
    if not texts:
        return None
    encoders = tuple(made[name].module for name, _ in pairs)
    null = tuple(tuple(map(int, tokenizers[name]([""])[0])) for _, name in pairs)
    network = made["unet"].module
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


def bundle(
    model: LatentDiffusion,
    params: Mapping[str, Any],
    made: Mapping[str, components.Component],
    tokenizers: Mapping[str, prompts.Tokenizer],
    index: Mapping[str, Any],
    schedulers: Mapping[str, Mapping[str, Any]],
    mesh: Mesh,
) -> Pretrained:
    """The pipeline of loaded parameters, {component: params}."""
    encoders = [params[name] for name in TEXTS if name in params]
    if isinstance(model.conditioner, conditioners.ClipPair):
        condition = {f"encoders_{i}": p for i, p in enumerate(encoders)}
    else:
        condition = {"encoder": encoders[0]} if encoders else {}
    scale = jax.device_put(
        jnp.float32(autoencoder.scaling_factor(made["vae"].config)), sharding.replicated(mesh)
    )
    return Pretrained(
        model=model,
        params={"network": params["unet"]} | ({"conditioner": condition} if condition else {}),
        arrays={"params": params["vae"], "scale": scale},
        components=made,
        tokenizers=tokenizers,
        index=index,
        schedulers=schedulers,
        mesh=mesh,
    )
