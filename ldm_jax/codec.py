"""A codec turns data into what the diffusion model sees and back: nothing (pixels), or a trained autoencoder.

Its functions take the codec's arrays first, so that a jitted caller passes them as arguments and no checkpoint of a
diffusion model stores them. Latents are multiplied by a scale, 1 / their standard deviation (Rombach et al. 2022,
appendix G), so that path and solver may assume unit variance.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ldm_jax.types import Params

Images = Float[Array, "b *space c"]


class Codec(NamedTuple):
    encode: Callable[[Params, Images, Array], Images]  # (arrays, x, rng) -> z
    decode: Callable[[Params, Images], Images]  # (arrays, z) -> x
    shape: Callable[[tuple[int, ...]], tuple[int, ...]]  # (*space, c) of the data -> of the latents


def identity() -> Codec:
    """Diffusion on the data itself."""
    return Codec(
        encode=lambda arrays, x, rng: x, decode=lambda arrays, z: z, shape=lambda shape: shape
    )


def autoencoder(model: Any) -> Codec:
    """The codec of a network with `latents(x, rng)` and `decode(z)`; arrays: `{"params": ..., "scale": scalar}`."""

    def encode(arrays, x, rng):
        z = model.apply({"params": arrays["params"]}, x, rng, method="latents")
        return z * arrays["scale"]

    def decode(arrays, z):
        return model.apply({"params": arrays["params"]}, z / arrays["scale"], method="decode")

    def shape(data_shape):
        def latents(x):
            key = jax.random.key(0)
            return model.init_with_output(key, x, key, method="latents")[0]

        return jax.eval_shape(latents, jnp.zeros((1, *data_shape))).shape[1:]

    return Codec(encode, decode, shape)
