"""Latent diffusion in JAX: train an autoencoder, train a conditioned diffusion model in its latent space, sample."""

from typing import Any


def __getattr__(name: str) -> Any:
    """`from_pretrained`, brought in when asked for: data workers import this package without jax."""
    if name == "from_pretrained":
        from ldm_jax.pretrained import from_pretrained

        return from_pretrained
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
