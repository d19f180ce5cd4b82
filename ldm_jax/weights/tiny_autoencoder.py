"""The tiny autoencoders under diffusers' names, `AutoencoderTiny`: `taesd` and `taesdxl` of madebyollin.

Each half of theirs is a list of layers, in which activations and enlargements count as well.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from ldm_jax.models import tiny_autoencoder
from ldm_jax.weights import autoencoder, configs
from ldm_jax.weights.table import Row, Table, under

TAKES = dict(
    in_channels=3,
    out_channels=3,
    encoder_block_out_channels=(64,) * 4,
    decoder_block_out_channels=(64,) * 4,
    latent_channels=4,
    num_encoder_blocks=(1, 3, 3, 3),
    num_decoder_blocks=(3, 3, 3, 1),
)
ONLY = dict(
    act_fn=("relu",),
    upsample_fn=("nearest",),
    upsampling_scaling_factor=(2,),
    latent_magnitude=(tiny_autoencoder.MAGNITUDE,),
    latent_shift=(tiny_autoencoder.SHIFT,),
    shift_factor=(0.0, None),
)
IDLE = ("block_out_channels", "force_upcast", "scaling_factor")
BLOCK = (Row("conv_0", "conv.0"), Row("conv_1", "conv.2"), Row("conv_2", "conv.4"))


def table(encoder_blocks: Sequence[int], decoder_blocks: Sequence[int]) -> Table:
    """`models.tiny_autoencoder.TinyAutoencoder` with so many blocks at each level."""
    return (
        *under("encoder", "encoder.layers", tuple(_rows("down", encoder_blocks, 0, 0))),
        # After the first convolution stands an activation, and an enlargement before each of the others but the last.
        *under("decoder", "decoder.layers", tuple(_rows("up", decoder_blocks, 1, 1))),
    )


def _rows(way: str, blocks: Sequence[int], activation: int, enlargement: int) -> Iterator[Row]:
    yield Row("conv_in", "0")
    at = 1 + activation
    for i, count in enumerate(blocks):
        if i > 0:
            at += enlargement
            yield Row(f"{way}_{i}", f"{at}")
            at += 1
        for j in range(count):
            yield from under(f"level_{i}_block_{j}", f"{at}", BLOCK)
            at += 1
    yield Row("conv_out", f"{at}")


def from_config(
    config: Mapping[str, Any], dtype: Any = jnp.float32
) -> tiny_autoencoder.TinyAutoencoder:
    """The network of an `AutoencoderTiny`'s config, in `autoencoder.compute_dtype(config, dtype)`.

    Raises:
      ValueError: the config asks for what we lack.
    """
    given = configs.read(config, "AutoencoderTiny", TAKES, ONLY, IDLE)
    encoder, decoder = given["num_encoder_blocks"], given["num_decoder_blocks"]
    widths = given["encoder_block_out_channels"], given["decoder_block_out_channels"]
    if (
        len({*widths[0], *widths[1]}) != 1
        or (len(widths[0]), len(widths[1])) != (len(encoder), len(decoder))
        or given["in_channels"] != given["out_channels"]
    ):
        told = ", ".join(f"{key}={value!r}" for key, value in given.items())
        raise ValueError(
            "the config of this AutoencoderTiny asks for other than one width throughout, one number of blocks a level "
            f"and as many channels out as in ({told}); such a model cannot be loaded"
        )
    return tiny_autoencoder.TinyAutoencoder(
        width=widths[0][0],
        encoder_blocks=encoder,
        decoder_blocks=decoder,
        embed=given["latent_channels"],
        channels=given["in_channels"],
        dtype=autoencoder.compute_dtype(config, dtype),
    )


def to_config(
    model: tiny_autoencoder.TinyAutoencoder, scaling_factor: float = 1.0
) -> dict[str, Any]:
    """The inverse."""
    return {
        "_class_name": "AutoencoderTiny",
        "in_channels": model.channels,
        "out_channels": model.channels,
        "encoder_block_out_channels": [model.width] * len(model.encoder_blocks),
        "decoder_block_out_channels": [model.width] * len(model.decoder_blocks),
        "num_encoder_blocks": list(model.encoder_blocks),
        "num_decoder_blocks": list(model.decoder_blocks),
        "latent_channels": model.embed,
        "act_fn": "relu",
        "scaling_factor": scaling_factor,
    }


def scaling_factor(config: Mapping[str, Any]) -> float:
    """What latents are multiplied by before the diffusion model sees them: 1 unless the config says otherwise."""
    return float(config.get("scaling_factor", 1.0))
