"""Pretrained weights as the start of a training run.

What is trained and what is frozen are parts of one model, so they are loaded apart: each network by itself, leaf by
leaf onto its shardings, in float32. Configs, names and shapes are looked at before the first tensor is read.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ldm_jax.conditioners import ClipPair
from ldm_jax.data.pipeline import Rows
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.pretrained import components, load
from ldm_jax.types import Params
from ldm_jax.weights import autoencoder, folder, prompts, table, unet

NETWORK, CODEC = "unet", "vae"
Stored = Mapping[str, Mapping[str, Any]]  # component -> its tensors, not read yet


class Start(NamedTuple):
    """A pretrained model before its weights are read."""

    model: LatentDiffusion
    components: Mapping[str, components.Component]
    tokenizers: Mapping[str, prompts.Tokenizer]  # by the field that they make
    folders: Mapping[str, Path]
    noise: Mapping[str, Any]  # the scheduler's config
    scale: float  # of the latents

    @property
    def encoders(self) -> dict[str, str]:
        """The text encoders' names among the components, by their names in the conditioner's parameters."""
        names = [name for name in load.TEXTS if name in self.components]
        if isinstance(self.model.conditioner, ClipPair):
            return {f"encoders_{i}": name for i, name in enumerate(names)}
        return dict(zip(["encoder"], names, strict=False))

    @property
    def texts(self) -> dict[str, Rows]:
        """Functions from captions to rows of ids, for the fields of them that the model reads."""
        return {field: functools.partial(prompts.rows, of) for field, of in self.tokenizers.items()}


def from_folder(path: str | Path, dtype: Any = "float32", remat: bool = False) -> Start:
    """The model of a folder that diffusers wrote, which computes in `dtype`.

    The autoencoder computes in float32 where its config asks for that: its latents are the data. With `remat` the
    backward pass computes the network's blocks anew instead of keeping their activations.

    Raises:
      FileNotFoundError, ValueError: no such folder, or a model that is not text-to-image or not known here.
    """
    if dtype not in load.DTYPES:
        raise ValueError(f"dtype={dtype!r} is not among {load.DTYPES}")
    opened = folder.open_folder(path)
    kind = opened.index.get("_class_name")
    if missing := [name for name in (NETWORK, CODEC, "scheduler") if name not in opened.parts]:
        raise ValueError(f"{path} is a {kind} and lacks the components {missing}; give another")

    def made(name):
        part = opened.parts[name]
        whole = name == CODEC and part.config.get("force_upcast")
        return components.make(part.kind, part.config, jnp.dtype("float32" if whole else dtype))

    networks = {name: made(name) for name in (NETWORK, CODEC, *load.TEXTS) if name in opened.parts}
    network = networks[NETWORK]
    spatial = unet.channels(network.config).spatial
    if spatial or opened.index.get("requires_aesthetics_score"):
        reads = f"{spatial} channels beside the latents" if spatial else "an aesthetic score"
        raise ValueError(
            f"{path} is a {kind} that reads {reads}, which the data has not; give a model of text alone"
        )
    networks[NETWORK] = dataclasses.replace(network, module=network.module.clone(remat=remat))
    read = {
        name: prompts.load(opened.parts[name].folder)
        for name in load.TOKENIZERS
        if name in opened.parts
    }
    noise = opened.parts["scheduler"].config
    model = load.assemble(networks, read, opened.index, noise)
    fields = {name.replace("tokenizer", "tokens"): of for name, of in read.items()}
    return Start(
        model=model,
        components=networks,
        tokenizers={field: of for field, of in fields.items() if field in model.fields},
        folders={name: opened.parts[name].folder for name in networks},
        noise=noise,
        scale=autoencoder.scaling_factor(networks[CODEC].config),
    )


def shapes(of: Start) -> Params:
    """Shapes of the model's parameters, {"network": ..., "conditioner": ...}, in float32."""
    found = {"network": of.components[NETWORK].shapes}
    if of.encoders:
        found["conditioner"] = {k: of.components[name].shapes for k, name in of.encoders.items()}
    return found


def tensors(of: Start, names: Iterable[str], variant: str = "") -> Stored:
    """The tensors of these components, which are all that their networks need; none is read yet.

    Raises:
      FileNotFoundError, ValueError: a file that is missing or damaged, or tensors that are those of another network.
    """
    found = {}
    for name in names:
        component = of.components[name]
        found[name] = folder.weights(of.folders[name], component.stem, variant)
        table.check(component.rows(found[name]), component.shapes, found[name], component.ignore)
    return found


def network(of: Start, stored: Stored, layouts: Params) -> Params:
    return of.components[NETWORK].load(stored[NETWORK], jnp.float32, layouts)


def conditioner(of: Start, stored: Stored, layouts: Params) -> Params:
    """The text encoders' parameters, as the conditioner has them."""
    return {
        key: of.components[name].load(stored[name], jnp.float32, layouts[key])
        for key, name in of.encoders.items()
    }


def codec(of: Start, stored: Stored, layouts: Params) -> Params:
    """The arrays of the codec; the scale is the model's own."""
    params = of.components[CODEC].load(stored[CODEC], jnp.float32, layouts)
    return {"params": params, "scale": np.float32(of.scale)}


def fingerprint(of: Start, stored: Stored) -> str:
    """sha256 of these tensors, and of all configs and tokenizers, whatever files they lie in."""
    configs = {name: dict(component.config) for name, component in of.components.items()}
    digest = hashlib.sha256(json.dumps([configs, dict(of.noise)], sort_keys=True).encode())
    for field, tokenizer in sorted(of.tokenizers.items()):
        for name, content in sorted(tokenizer.files.items()):
            digest.update(f"{field}/{name}".encode() + content)
    for component, held in sorted(stored.items()):
        for name, tensor in sorted(held.items()):
            digest.update(f"{component}/{name}".encode() + np.asarray(tensor).tobytes())
    return digest.hexdigest()
