"""What changes a pretrained model: LoRAs, words of textual inversion, another autoencoder. `pipe` is a `Pretrained`."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax.pretrained import assembly, components, kinds
from ldm_jax.training import sharding
from ldm_jax.weights import (
    files,
    folder,
    inversion,
    lora,
    lora_files,
    original,
    pickles,
)

Paths = str | Path | Sequence[str | Path]


def with_lora(pipe: Any, paths: Paths, weights: float | Sequence[float] = 1.0) -> Any:
    """The pipeline with LoRAs merged into its parameters, each at its weight; this one stays as it is.

    Files of diffusers (PEFT, and the form before it), kohya and LyCORIS (LoCon, LoHa, LoKr); see `weights.lora_files`.

    Raises:
      ValueError: a LoRA for another model, or one of a kind that is not supported; what does not fit is named.
    """
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    weights = [weights] * len(paths) if isinstance(weights, int | float) else list(weights)
    params = pipe.component_params()
    named = {}
    for name, component in pipe.components.items():
        if name == "vae":
            continue
        tables = [component.rows({})]
        if name == "unet":
            tables.append(original.unet(component.module, ""))
        named[name] = (params[name], tables)
    names = lora_files.their_names(named)
    read = [lora_files.load(path, names) for path in paths]
    changed = {name for found in read for name in found}
    return pipe.with_params(
        {
            name: lora.merge(params[name], [found.get(name, {}) for found in read], weights)
            for name in changed
        }
    )


def with_word(pipe: Any, path: str | Path, token: str | None = None) -> Any:
    """The pipeline that knows a word of textual inversion too; this one stays as it is.

    `token` is the word in prompts, where the file does not name it or where it shall have another name.

    Raises:
      ValueError: no such file of a word, vectors for other text encoders, or a word that is known already.
    """
    path = Path(path)
    read = files.read if path.suffix == ".safetensors" else pickles.read
    word = inversion.read(read(path), token)
    texts = {name for name in pipe.components if name.startswith("text_encoder")}
    if word.vectors.keys() != texts:
        raise ValueError(
            f"{path} has vectors for {sorted(word.vectors)} and the model has {sorted(texts)}; "
            "it was learnt with another model"
        )
    params, made, tokenizers = pipe.component_params(), dict(pipe.components), dict(pipe.tokenizers)
    for name, vectors in word.vectors.items():
        at = name.replace("text_encoder", "tokenizer")
        tokenizers[at] = tokenizers[at].add(word.token, len(vectors))
        table = params[name]["token"]["embedding"]
        longer = jax.device_put(inversion.add(table, vectors), table.sharding)
        params[name] = params[name] | {"token": {"embedding": longer}}
        old = made[name]
        settings = dict(old.config) | {
            "vocab_size": len(longer),
            "eos_token_id": tokenizers[at].end,
        }
        made[name] = components.make(old.kind, settings, old.module.dtype)
    model = assembly.assemble(made, tokenizers, pipe.index, pipe.schedulers["scheduler"])
    new = dataclasses.replace(pipe, model=model, components=made, tokenizers=tokenizers)
    return new.with_params(params)


def with_autoencoder(pipe: Any, path: str | Path, variant: str | None = None) -> Any:
    """The pipeline with the autoencoder of another folder, for better pictures or, with a tiny one, for previews.

    The folder has a config.json and safetensors; its latents must be those that the model was trained on.

    Raises:
      FileNotFoundError, ValueError: no such folder, no autoencoder that is known here, or one with other channels.
    """
    path = Path(path)
    config = folder.read_json(path / "config.json", "an autoencoder")
    kind = config.get("_class_name")
    if kind not in components.AUTOENCODERS:
        raise ValueError(
            f"{path} holds a {kind}; autoencoders are {sorted(components.AUTOENCODERS)}"
        )
    dtype = jax.tree.leaves(pipe.arrays["params"])[0].dtype
    made = components.make(kind, config, dtype)
    if made.module.embed != pipe.latent_channels:
        raise ValueError(
            f"the autoencoder of {path} has latents of {made.module.embed} channels and this model's have "
            f"{pipe.latent_channels}; give one for the same latents"
        )
    whole = sharding.replicated(pipe.mesh)
    tensors = made.stored(folder.weights(path, made.stem, variant))
    params = made.load(tensors, dtype, jax.tree.map(lambda _: whole, made.shapes))
    return dataclasses.replace(
        pipe,
        model=pipe.model._replace(codec=assembly.codec_of(made.module)),
        arrays={"params": params, "scale": jax.device_put(jnp.float32(made.scale), whole)},
        components=dict(pipe.components) | {"vae": made},
        index=dict(pipe.index) | {kinds.stored_name("vae", pipe.index): ["diffusers", kind]},
    )
