"""A codec turns data into what the diffusion model sees and back: nothing (pixels), or a trained autoencoder.

Its functions take the codec's arrays first, so that a jitted caller passes them as arguments and no checkpoint of a
diffusion model stores them. Latents are multiplied by a scale, 1 / their standard deviation (Rombach et al. 2022,
appendix G), so that path and solver may assume unit variance.

What is encoded beforehand (`python -m ldm_jax.cache`) are not latents but the `moments` of their posterior, mean and
log-variance side by side: each epoch then samples anew, with the noise that encoding the data would have drawn.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ldm_jax import tiles
from ldm_jax.models.autoencoder import Gaussian
from ldm_jax.tiles import PerAxis
from ldm_jax.types import Params

Images = Float[Array, "b *space c"]


class Codec(NamedTuple):
    encode: Callable[[Params, Images, Array], Images]  # (arrays, x, rng) -> z
    decode: Callable[[Params, Images], Images]  # (arrays, z) -> x
    shape: Callable[[tuple[int, ...]], tuple[int, ...]]  # (*space, c) of the data -> of the latents
    # (arrays, x) -> all that `from_moments` has to know of x; None: data are not to be encoded beforehand
    moments: Callable[[Params, Images], Images] | None = None


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

    def moments(arrays, x):
        found = model.apply({"params": arrays["params"]}, x, method="encode")
        both = (found.mean, found.logvar) if isinstance(found, Gaussian) else (found,)
        return jnp.concatenate(both, axis=-1)

    return Codec(encode, decode, shape, moments)


def from_moments(codec: Codec, posterior: bool) -> Codec:
    """The codec of data that are `codec.moments` of what they were: to encode them is to sample and to scale.

    Without a `posterior` the moments are the latents.
    """

    def encode(arrays, x, rng):
        z = Gaussian(*jnp.split(x, 2, axis=-1)).sample(rng) if posterior else x
        return z * arrays["scale"]

    return codec._replace(encode=encode, moments=None)


def tiled(codec: Codec, size: PerAxis = 64, overlap: PerAxis = 16, halo: int = 4) -> Codec:
    """The codec in overlapping tiles of latents, for data that are too large for its activations to fit.

    `size`, `overlap` and `halo` are in positions of latents, see `tiles`. Memory beyond data and latents is that of one
    tile; what is no larger than a tile is done whole. A decoder whose receptive field is within the halo gives the
    same; group norms and attention see a tile instead of the whole, so that others differ a little, smoothly. Latents
    that are samples of a posterior are blended like means.
    """

    def encode(arrays, x, rng):
        lengths = codec.shape(x.shape[1:])[:-1]
        tiling = tiles.axes(lengths, size, overlap)

        def one(x, number):
            return codec.encode(arrays, x, jax.random.fold_in(rng, number))

        return tiles.tiled(one, x, tiling, halo)

    def decode(arrays, z):
        tiling = tiles.axes(z.shape[1:-1], size, overlap)
        return tiles.tiled(lambda z, number: codec.decode(arrays, z), z, tiling, halo)

    return Codec(encode, decode, codec.shape)
