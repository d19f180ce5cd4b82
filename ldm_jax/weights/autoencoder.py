"""The autoencoders under diffusers' names: `AutoencoderKL`."""

from ldm_jax.weights import blocks
from ldm_jax.weights.table import Row, Table, under


def table() -> Table:
    """`models.autoencoder.KLAutoencoder`."""
    return (
        *under("encoder", "encoder", blocks.levels(blocks.ATTENTION)),
        *under("decoder", "decoder", blocks.levels(blocks.ATTENTION)),
        Row("quant_conv", "quant_conv"),
        Row("post_quant_conv", "post_quant_conv"),
    )
