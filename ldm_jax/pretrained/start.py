"""Pretrained weights as the start of a training run.

What is trained and what is frozen are parts of one model, so they are loaded apart: each network by itself, leaf by
leaf onto its shardings, in float32. Configs, names and shapes are looked at before the first tensor is read.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ldm_jax.data.pipeline import Rows
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.pretrained import assembly, components, load, single_files, sources
from ldm_jax.types import Params
from ldm_jax.weights import prompts, unet

NETWORK, CODEC = "unet", "vae"
Stored = Mapping[str, components.Tensors]  # component -> its tensors, not read yet


class Start(NamedTuple):
    """A pretrained model before its weights are read."""

    model: LatentDiffusion
    components: Mapping[str, components.Component]
    source: sources.Source

    @property
    def tokenizers(self) -> dict[str, prompts.Tokenizer]:
        """By the field that they make."""
        named = {n.replace("tokenizer", "tokens"): of for n, of in self.source.tokenizers.items()}
        return {field: of for field, of in named.items() if field in self.model.fields}

    @property
    def encoders(self) -> dict[str, str]:
        """The text encoders' names among the components, by their names in the conditioner's parameters."""
        return assembly.encoders(self.model.conditioner, self.components)

    @property
    def texts(self) -> dict[str, Rows]:
        """Functions from captions to rows of ids, for the fields of them that the model reads."""
        return {field: functools.partial(prompts.rows, of) for field, of in self.tokenizers.items()}


def from_folder(
    path: str | Path, variant: str = "", dtype: Any = "float32", remat: bool | str = False
) -> Start:
    """The model of a folder that diffusers wrote; `variant` is of its files' names, the rest as in `from_source`.

    Raises:
      FileNotFoundError, ValueError: no such folder, or what `from_source` refuses.
    """
    return from_source(sources.open_folder(Path(path), variant or None), path, dtype, remat)


def from_file(
    path: str | Path,
    config: str | Path = "",
    tokenizers: Sequence[str | Path] = (),
    dtype: Any = "float32",
    remat: bool | str = False,
) -> Start:
    """The model of a single file in the original layout; `config` and `tokenizers` as in `load.from_pretrained`.

    Raises:
      FileNotFoundError, ValueError: no such file, one that does not tell all, or what `from_source` refuses.
    """
    source = single_files.open_file(Path(path), config or None, tokenizers, ema=False)
    return from_source(source, path, dtype, remat)


def from_source(source: sources.Source, path: str | Path, dtype: Any, remat: bool | str) -> Start:
    """The model of what was found at `path`, which computes in `dtype`.

    The autoencoder computes in float32 where its config asks for that: its latents are the data. With `remat` the
    backward pass computes the network's blocks anew instead of keeping their activations, but for those that a name
    of `once.KEEP` keeps.

    Raises:
      ValueError: an unknown type, or a model that is not text-to-image or not known here.
    """
    if dtype not in load.DTYPES:
        raise ValueError(f"dtype={dtype!r} is not among {load.DTYPES}")
    if source.steering:
        raise ValueError(
            f"{path} has ControlNets, which are not trained here; give the model without them"
        )

    def made(name):
        kind, settings = source.networks[name]
        whole = name == CODEC and settings.get("force_upcast")
        return components.make(kind, settings, jnp.dtype("float32" if whole else dtype))

    networks = {n: made(n) for n in (NETWORK, CODEC, *sources.TEXTS) if n in source.networks}
    network = networks[NETWORK]
    spatial = unet.channels(network.config).spatial
    if spatial or source.index.get("requires_aesthetics_score"):
        reads = f"{spatial} channels beside the latents" if spatial else "an aesthetic score"
        raise ValueError(
            f"{path} is a {source.index.get('_class_name')} that reads {reads}, which the data has not; "
            "give a model of text alone"
        )
    networks[NETWORK] = dataclasses.replace(network, module=network.module.clone(remat=remat))
    noise = source.schedulers["scheduler"]
    return Start(
        assembly.assemble(networks, source.tokenizers, source.index, noise), networks, source
    )


def shapes(of: Start) -> Params:
    """Shapes of the model's parameters, {"network": ..., "conditioner": ...}, in float32."""
    found = {"network": of.components[NETWORK].shapes}
    if of.encoders:
        found["conditioner"] = {k: of.components[name].shapes for k, name in of.encoders.items()}
    return found


def tensors(of: Start, names: Iterable[str]) -> Stored:
    """The tensors of these components, which are all that their networks need; none is read yet.

    Raises:
      FileNotFoundError, ValueError: a file that is missing or damaged, or tensors that are those of another network.
    """
    found = {}
    for name in names:
        component = of.components[name]
        found[name] = given = of.source.tensors(name, component)
        component.check(given)
    return found


def _loaded(of: Start, stored: Stored, name: str, layouts: Params) -> Params:
    return of.components[name].load(stored[name], jnp.float32, layouts)


def network(of: Start, stored: Stored, layouts: Params) -> Params:
    return _loaded(of, stored, NETWORK, layouts)


def conditioner(of: Start, stored: Stored, layouts: Params) -> Params:
    """The text encoders' parameters, as the conditioner has them."""
    return {key: _loaded(of, stored, name, layouts[key]) for key, name in of.encoders.items()}


def codec(of: Start, stored: Stored, layouts: Params) -> Params:
    """The arrays of the codec; the scale is the model's own."""
    scale = np.float32(of.components[CODEC].scale)
    return {"params": _loaded(of, stored, CODEC, layouts), "scale": scale}


def fingerprint(of: Start, stored: Stored) -> str:
    """sha256 of these tensors, and of all configs and tokenizers, whatever files they lie in."""
    configs = {name: dict(component.config) for name, component in of.components.items()}
    digest = hashlib.sha256(
        json.dumps([configs, dict(of.source.schedulers["scheduler"])], sort_keys=True).encode()
    )
    for field, tokenizer in sorted(of.tokenizers.items()):
        for name, content in sorted(tokenizer.files.items()):
            digest.update(f"{field}/{name}".encode() + content)
    for component, held in sorted(stored.items()):
        for name, tensor in sorted(held.tensors.items()):
            digest.update(f"{component}/{name}".encode() + np.asarray(tensor).tobytes())
    return digest.hexdigest()
