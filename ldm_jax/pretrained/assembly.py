"""From the networks of a pretrained model, without their weights, to the model that they make up."""

import functools
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

from ldm_jax import codec, conditioners
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.models import text
from ldm_jax.pretrained import components, inputs, sources
from ldm_jax.weights import scheduler

AESTHETIC_NULL = 2.5  # the refiner's score where guidance leads away from
# The same for equal networks, so that models of one structure share their compiled programs.
codec_of = functools.lru_cache(maxsize=8)(codec.autoencoder)


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
        codec=codec_of(made["vae"].module),
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


def encoders(conditioner: Any, names: Container[str]) -> dict[str, str]:
    """The text encoders among components of these names, by their names in the conditioner's parameters."""
    texts = [name for name in sources.TEXTS if name in names]
    if isinstance(conditioner, conditioners.ClipPair):
        return {f"encoders_{i}": name for i, name in enumerate(texts)}
    return dict(zip(["encoder"], texts, strict=False))
