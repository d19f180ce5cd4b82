"""The VQ autoencoders of the paper under diffusers' names: `VQModel`. Their halves are those of `autoencoder`.

The paper does not scale the latents of these, and neither do the first configs in diffusers' format, which have no
`scaling_factor`. Where there is none diffusers assumes Stable Diffusion's 0.18215, by which its `LDMPipeline` divides
since pull request 5213; with CompVis/ldm-celebahq-256 that spoils the images (its issue 6725), so here it is 1.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from ldm_jax.models import vq
from ldm_jax.weights import autoencoder, configs
from ldm_jax.weights.table import Row, Table

ONLY = autoencoder.ONLY | dict(norm_type=("group",))


def table(tensors: Mapping[str, Any] = {}) -> Table:
    """`models.vq.VQAutoencoder`; `tensors` as in `autoencoder.table`."""
    return (*autoencoder.table(tensors), Row("codebook", "quantize.embedding.weight"))


def from_config(config: Mapping[str, Any], dtype: Any = jnp.float32) -> vq.VQAutoencoder:
    """The network of a `VQModel`'s config, in `autoencoder.compute_dtype(config, dtype)`.

    Raises:
      ValueError: the config asks for what we lack.
    """
    own = dict(latent_channels=3, num_vq_embeddings=256, vq_embed_dim=None)
    given = configs.read(config, "VQModel", autoencoder.TAKES | own, ONLY, autoencoder.IDLE)
    return vq.VQAutoencoder(
        **autoencoder.settings(given, "VQModel"),
        z_channels=given["latent_channels"],
        embed=given["vq_embed_dim"] or given["latent_channels"],
        codes=given["num_vq_embeddings"],
        dtype=autoencoder.compute_dtype(config, dtype),
    )


def to_config(
    model: vq.VQAutoencoder, scaling_factor: float = 1.0, force_upcast: bool = False
) -> dict[str, Any]:
    """The inverse; what the network does not know is given. Dropout is not told.

    Raises:
      ValueError: a stride other than 2, or codes without a codebook, which diffusers lacks.
    """
    if model.levels:
        raise ValueError(
            f"diffusers' VQModel has a codebook, and the codes of levels={tuple(model.levels)} need none; "
            "keep the run's own checkpoint"
        )
    return (
        {"_class_name": "VQModel"}
        | autoencoder.config_of(model)
        | dict(
            latent_channels=model.z_channels,
            vq_embed_dim=model.embed,
            num_vq_embeddings=model.codes,
            scaling_factor=scaling_factor,
            force_upcast=force_upcast,
        )
    )


def scaling_factor(config: Mapping[str, Any]) -> float:
    """What latents are multiplied by before the diffusion model sees them: 1 unless the config says otherwise."""
    return float(config.get("scaling_factor", 1.0))
