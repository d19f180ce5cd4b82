"""The two ways in which pictures get the 299 x 299 pixels of Inception; which one is part of the metric.

    tensorflow   bilinear between the four nearest pixels, without a filter before, pixel i of n at i * size / n: what
                 TensorFlow 1 did, and so what FID has meant since Heusel et al. 2017 (torch-fidelity, pytorch-fid of
                 the TF-compatible kind, the evaluator of Dhariwal & Nichol 2021)
    clean        bicubic, with a support that grows with the scale, in float32 and not rounded: Parmar et al. 2022

Numbers of the two do not compare. The first shrinks pictures with aliasing, which the features see.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num, UInt8
from PIL import Image


def tensorflow(x: Num[Array, "b h w c"], size: int) -> Float[Array, "b {size} {size} c"]:
    """TensorFlow 1's `resize_bilinear` (align_corners=False), in its order of float32 operations; jittable."""
    x = x.astype(jnp.float32)
    for axis in (2, 1):
        n = x.shape[axis]
        at = np.arange(size, dtype=np.float32) * np.float32(n / size)
        low = at.astype(np.int32)
        high = np.minimum(low + 1, n - 1)
        share = (at - low).reshape(-1, *(1,) * (x.ndim - 1 - axis))
        first, second = (jnp.take(x, i, axis=axis) for i in (low, high))
        x = first + (second - first) * share
    return x


def clean(image: UInt8[np.ndarray, "h w c"], size: int) -> Float[np.ndarray, "{size} {size} c"]:
    """Pillow's bicubic filter on every channel in float32; values may leave 0..255 a little."""
    channels = [
        Image.fromarray(np.ascontiguousarray(image[..., c], np.float32)).resize(
            (size, size), Image.Resampling.BICUBIC
        )
        for c in range(image.shape[-1])
    ]
    return np.stack([np.asarray(channel) for channel in channels], axis=-1)


WAYS = ("tensorflow", "clean")


def steps(way: str, size: int) -> tuple[Callable, Callable]:
    """A way as what is done to a picture on the host, and to a batch on the device."""
    if way == "clean":
        return lambda image: clean(image, size), lambda x: x
    if way == "tensorflow":
        return lambda image: image, lambda x: tensorflow(x, size)
    raise ValueError(f"there is no way {way!r} of resizing; the choices are {list(WAYS)}")
