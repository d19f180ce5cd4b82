"""What normalises the embeddings of Stable unCLIP under diffusers' names, `StableUnCLIPImageNormalizer`."""

from collections.abc import Mapping
from typing import Any

from ldm_jax.models import unclip
from ldm_jax.weights import configs
from ldm_jax.weights.table import Row, Table


def table() -> Table:
    """`models.unclip.Normalizer`."""
    return (Row("mean", "mean"), Row("std", "std"))


def from_config(config: Mapping[str, Any]) -> unclip.Normalizer:
    """The module of the config; its numbers are few, and it computes in the type of its parameters.

    Raises:
      ValueError: the config asks for what we lack.
    """
    return unclip.Normalizer(
        configs.read(config, "normalizer", dict(embedding_dim=768))["embedding_dim"]
    )


def to_config(module: unclip.Normalizer) -> dict[str, Any]:
    """The inverse."""
    return {"_class_name": "StableUnCLIPImageNormalizer", "embedding_dim": module.width}
