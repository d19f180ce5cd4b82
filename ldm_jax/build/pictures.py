"""Pictures, masks and margins that a user gives, as arrays that fit a model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from ldm_jax import conditioners
from ldm_jax.data import transforms
from ldm_jax.data.examples import SEGMENTATION
from ldm_jax.diffusion import editing
from ldm_jax.pipeline import Pipeline
from ldm_jax.tasks import Sampling

Images = Float[np.ndarray, "n *space c"]
VOID = 255  # of a map: no class
MASK_AT = 128  # of 255: from here on a mask means that something new is made


def read_picture(path: str | Path, size: tuple[int, int] | None) -> Float[np.ndarray, "h w 3"]:
    """A picture in [-1, 1], cut and resized like the data of a run; as large as it is where `size` is None.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it cannot be decoded.
    """
    picture = _decoded(path)
    return transforms.to_unit(np.asarray(picture) if size is None else centred(picture, size))


def centred(picture: Image.Image, size: tuple[int, int]) -> UInt8[np.ndarray, "h w 3"]:
    """The middle of a picture in a size, as validation data are seen."""
    rng = np.random.default_rng(0)  # decides nothing
    view = transforms.window(picture.size, size, crop="center", flip=False, rng=rng)
    return transforms.show(picture, view, size)


def pictures_of(pipe: Pipeline, images: Sequence[Any], exact: bool) -> Images:
    """Arrays as they are, files in the model's size; or, `exact`, in their own."""
    size = None if exact else pipe.size
    found = [
        image if isinstance(image, np.ndarray) else read_picture(image, size) for image in images
    ]
    for picture in found:
        shape = found[0].shape if exact else (*pipe.size, picture.shape[-1])
        if picture.shape != shape:
            raise ValueError(
                f"a picture of shape {picture.shape} was given where {shape} is needed"
            )
    return np.stack(found).astype(np.float32)


def enlarged(pipe: Pipeline, images: Sequence[Any], size: Sequence[int]) -> Images:
    """Pictures in the model's size, enlarged to another; `space_of` has checked it."""
    return np.asarray(editing.enlarged(pictures_of(pipe, images, exact=False), size, "cubic"))


def small(
    pipe: Pipeline, images: Sequence[Any], sampling: Sampling
) -> tuple[Images, tuple[int, ...] | None]:
    """Pictures as they are, and the latents' positions for them enlarged; None for the model's own."""
    found = pictures_of(pipe, images, exact=True)
    space = space_of(pipe, tuple(n * pipe.shrink for n in found.shape[1:-1]))
    if space is not None and sampling.guidance != 1.0:
        raise ValueError(
            f"pictures of another size than {_by([n // pipe.shrink for n in pipe.size])} are made larger in windows, "
            "which guidance does not have; give --guidance 1"
        )
    return found, space


def masks(pipe: Pipeline, masks: Sequence[Any]) -> Float[np.ndarray, "n *space 1"]:
    """Arrays of numbers, or files that are white where something new is made, of the model's size."""
    found = []
    for mask in masks:
        if not isinstance(mask, np.ndarray):
            mask = np.asarray(_decoded(mask).convert("L")) >= MASK_AT
        if mask.shape != pipe.size:
            raise ValueError(
                f"a mask of {_by(mask.shape)} pixels does not fit pictures of {_by(pipe.size)}; make it of their size"
            )
        if not mask.any():
            raise ValueError(
                "a mask is empty; it is white (or 1) where something new is to be made"
            )
        found.append((mask > 0).astype(np.float32)[..., None])
    return np.stack(found)


def maps(
    pipe: Pipeline, maps: Sequence[Any]
) -> tuple[Int[np.ndarray, "n *space 1"], tuple[int, ...] | None]:
    """Maps of classes, and the latents' positions for them; None for the model's own. In files 255 is no class.

    Raises:
      FileNotFoundError, ValueError: see `_bytes`; a class that the model does not know, or a size that it cannot draw.
    """
    known, found = conditioners.counted(pipe.model.conditioner)[SEGMENTATION], []
    for given in maps:
        if isinstance(given, np.ndarray):
            labels = given
        else:
            try:
                labels = transforms.decode_labels(_bytes(given))
            except transforms.BadImage as error:
                raise ValueError(f"the map {str(given)!r}: {error}") from error
            labels = np.where(labels == VOID, -1, labels)
        wrong = labels[(labels < known.start) | (labels >= known.stop)]
        if wrong.size:
            raise ValueError(
                f"a map has the class {wrong[0]}, and the model knows {known.stop} classes (0 to {known.stop - 1}); "
                "correct the map"
            )
        found.append(labels.astype(np.int32)[..., None])
    if len({labels.shape for labels in found}) > 1:
        sizes = " and ".join(_by(labels.shape[:-1]) for labels in found)
        raise ValueError(f"the maps of {sizes} differ in size; draw them one by one")
    space = space_of(pipe, found[0].shape[:-1])
    z = jnp.zeros((1, *(space or pipe.shape[:-1]), pipe.shape[-1]))
    batch = {SEGMENTATION: jnp.asarray(found[0][None])}
    if set(pipe.model.fields) == {SEGMENTATION}:  # looks whether the network's levels divide it
        jax.eval_shape(
            lambda params: pipe.model.raw(params)(
                z, jnp.zeros(1), pipe.model.condition(params, batch)
            ),
            pipe.params,
        )
    return np.stack(found), space


def with_margins(
    pipe: Pipeline, pictures: Images, margins: Sequence[int]
) -> tuple[Float[np.ndarray, "n *large c"], Float[np.ndarray, "n *large 1"]]:
    axes = len(pipe.size)
    if len(margins) != 2 * axes or min(margins) < 0 or not any(margins):
        raise ValueError(
            f"margins={list(margins)} must be {2 * axes} numbers, at least 0 and not all of them, such as "
            "8,8,0,16 for top, bottom, left and right"
        )
    pairs = [tuple(margins[i : i + 2]) for i in range(0, 2 * axes, 2)]
    return editing.padded(pictures, pairs)


def space_of(pipe: Pipeline, size: tuple[int, ...]) -> tuple[int, ...] | None:
    """The latents' positions for data of a size; None for the model's own.

    Raises:
      ValueError: a size that is smaller than the model's, or that the codec's factor does not divide.
    """
    if len(size) != len(pipe.size):
        raise ValueError(
            f"size={list(size)} must be {len(pipe.size)} numbers, such as {_by(pipe.size)}"
        )
    factors = [n // z for n, z in zip(pipe.size, pipe.shape[:-1], strict=True)]
    near = [
        max(round(n / f) * f, least) for n, f, least in zip(size, factors, pipe.size, strict=True)
    ]
    if tuple(near) != tuple(size):
        raise ValueError(
            f"{_by(size)} pixels cannot be drawn: each side is a multiple of {max(factors)} and at least that of "
            f"{_by(pipe.size)}; the nearest that works is {_by(near)}"
        )
    space = tuple(n // f for n, f in zip(size, factors, strict=True))
    return None if space == pipe.shape[:-1] else space


def _bytes(path: str | Path) -> bytes:
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no picture {str(path)!r}")
    return Path(path).read_bytes()


def _decoded(path: str | Path) -> Any:
    try:
        return transforms.decode(_bytes(path))
    except transforms.BadImage as error:
        raise ValueError(f"the picture {str(path)!r}: {error}") from error


def _by(size: Sequence[int]) -> str:
    return "x".join(str(n) for n in size)
