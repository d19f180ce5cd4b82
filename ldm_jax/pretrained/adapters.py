"""Small files that change a pretrained model: LoRAs and the words of textual inversion. `pipe` is a `Pretrained`."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from ldm_jax.pretrained import components
from ldm_jax.weights import files, inversion, lora, lora_files, original, pickles

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
    from ldm_jax.pretrained import load  # which imports the pipeline

    model = load.assemble(made, tokenizers, pipe.index, pipe.schedulers["scheduler"])
    new = dataclasses.replace(pipe, model=model, components=made, tokenizers=tokenizers)
    return new.with_params(params)
