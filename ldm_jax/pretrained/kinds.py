"""What a pipeline of diffusers consists of, by its class."""

import re
from collections.abc import Mapping
from typing import Any, TypeVar

USUAL = ("unet", "vae", "scheduler")
FIRST = ("unet", "vqvae", "scheduler")  # of the pipelines of Rombach et al.'s own models
# What reads images and is no part of the model itself.
VISION = ("image_encoder", "image_normalizer")
NOISED = ("image_normalizer", "image_noising_scheduler")
# What those must have that are not Stable Diffusion with another input; other classes have what is USUAL.
NEEDED = {
    "LDMPipeline": FIRST,
    "LDMSuperResolutionPipeline": FIRST,
    "LDMTextToImagePipeline": (*FIRST, "bert", "tokenizer"),
    "StableDiffusionImageVariationPipeline": (*USUAL, "image_encoder"),
    "StableUnCLIPImg2ImgPipeline": (*USUAL, "text_encoder", "tokenizer", "image_encoder", *NOISED),
}
# Those whose latents are not scaled, whatever the autoencoder's config says.
UNSCALED = ("LDMSuperResolutionPipeline",)
# Names of components -> those that they have elsewhere.
RENAMED = {"vqvae": "vae", "bert": "text_encoder"}

T = TypeVar("T")


def needed(index: Mapping[str, Any]) -> tuple[str, ...]:
    """The components without which the pipeline of this index is none, by their names in it."""
    return NEEDED.get(index.get("_class_name"), USUAL)


def renamed(parts: Mapping[str, T]) -> dict[str, T]:
    """Components by the usual names."""
    return {RENAMED.get(name, name): part for name, part in parts.items()}


def original_name(name: str, kind: str) -> str:
    """What a pipeline of this class calls a component with a usual name."""
    names = {usual: old for old, usual in RENAMED.items() if old in NEEDED.get(kind, ())}
    return names.get(name, name)


def stored_name(name: str, index: Mapping[str, Any]) -> str:
    """The name in this index of a component with a usual name."""
    return next((old for old, usual in RENAMED.items() if usual == name and old in index), name)


def controlled(kind: str) -> str:
    """The class of a pipeline of this class with ControlNets.

    Raises:
      ValueError: diffusers has none.
    """
    if match := re.fullmatch(
        r"(StableDiffusion(?:XL)?)(?:ControlNet)?(|Img2Img|Inpaint)Pipeline", kind
    ):
        return f"{match[1]}ControlNet{match[2]}Pipeline"
    raise ValueError(
        f"diffusers has no {kind} with ControlNets, so that its folder cannot be written; load it without them"
    )
