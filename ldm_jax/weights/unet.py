"""The U-Net under diffusers' names: `UNet2DConditionModel` and `UNet2DModel`."""

from ldm_jax.weights import blocks
from ldm_jax.weights.table import Row, Table


def table(transformer: bool = True) -> Table:
    """`models.unet.UNet`; with spatial transformers, or with plain attention (`UNet2DModel`)."""
    return (
        Row("time/in", "time_embedding.linear_1"),
        Row("time/out", "time_embedding.linear_2"),
        Row("vector/in", "class_embedding.linear_1"),
        Row("vector/out", "class_embedding.linear_2"),
        *blocks.levels(blocks.TRANSFORMER if transformer else blocks.ATTENTION),
    )
