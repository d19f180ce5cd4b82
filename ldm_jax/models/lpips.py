"""LPIPS (Zhang et al. 2018): how differently two pictures look, by VGG16 with learned weights on its channels."""

from flax import linen as nn
from jaxtyping import Array, Float

from ldm_jax.models.features import VGG16_BLOCKS, VGG16Features, perceptual_distance


class LPIPS(nn.Module):
    """Two batches of RGB pictures in [-1, 1] -> one distance a pair; version 0.1 of the published metric."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w 3"], y: Float[Array, "b h w 3"]
    ) -> Float[Array, " b"]:
        weights = [
            # As they lie in the published file: the kernels of convolutions to one channel.
            self.param(f"weight_{i}", nn.initializers.ones, (1, width, 1, 1)).reshape(width)
            for i, (width, _) in enumerate(VGG16_BLOCKS)
        ]
        return perceptual_distance(VGG16Features(name="trunk"), x, y, weights)
