"""Embeddings of images with noise, on which Stable unCLIP is conditioned (after Ramesh et al. 2022, section 2.1).

CLIP's embeddings are brought to mean 0 and deviation 1, each feature by itself, get noise there, and go back. The
reference is `StableUnCLIPImageNormalizer` of diffusers.
"""

from flax import linen as nn
from jaxtyping import Array, Float


class Normalizer(nn.Module):
    """Mean and deviation of embeddings."""

    width: int

    def setup(self):
        self.mean = self.param("mean", nn.initializers.zeros, (1, self.width))
        self.std = self.param("std", nn.initializers.ones, (1, self.width))

    def __call__(self, x: Float[Array, "b d"]) -> Float[Array, "b d"]:
        return (x - self.mean) / self.std

    def inverse(self, x: Float[Array, "b d"]) -> Float[Array, "b d"]:
        return x * self.std + self.mean
