"""Pictures larger than the model was trained on, in bounded memory, and pictures whose edges continue each other.

Methods of `Pretrained`, which is `pipe` here. Arguments are those of all `verbs`.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from ldm_jax import latent_diffusion
from ldm_jax.diffusion import editing
from ldm_jax.pretrained import inputs, sampling, verbs
from ldm_jax.pretrained.inputs import Prompts
from ldm_jax.pretrained.verbs import Images, Strength


def panorama(
    pipe: Any,
    prompt: Prompts,
    height: int,
    width: int,
    negative_prompt: Prompts | None = None,
    *,
    window: int | None = None,
    overlap: int | None = None,
    wrap: tuple[bool, bool] = (False, False),
    steps: int = 50,
    guidance: float = 7.5,
    solver: str = "ddim",
    seed: int = 0,
    latents: Any = None,
    eta: float = 0.0,
    **sizes: Any,
) -> Float[np.ndarray, "b height width 3"]:
    """Pictures of any size: at each step the model sees overlapping windows of its own (MultiDiffusion).

    `window` and `overlap` are in pixels, by default what the model was trained on, and three quarters of it; with
    `wrap` along (height, width) the edges continue each other. See `diffusion.windows`, and `with_tiles` for the
    decoder.
    """
    inputs.only(pipe, "panorama", 0)
    texts = inputs.check(prompt, solver)
    size = (height, width)
    start = inputs.start(pipe, latents, len(texts), seed, size)
    settings = _windows(pipe, window, overlap, wrap)
    seen = tuple(min(side, settings[0] * pipe.factor) for side in size)
    given = inputs.conditions(pipe, texts, negative_prompt, seen, sizes)
    how = dict(eta=eta, windows=settings)
    at = inputs.points(pipe, steps)
    return verbs.draw(pipe, start, at, *given, {}, solver, guidance, seed, **how)


def high_resolution(
    pipe: Any,
    prompt: Prompts,
    images: Images,
    height: int,
    width: int,
    negative_prompt: Prompts | None = None,
    *,
    strength: Strength = 0.5,
    window: int | None = None,
    overlap: int | None = None,
    steps: int = 50,
    guidance: float = 7.5,
    solver: str = "ddim",
    seed: int = 0,
    latents: Any = None,
    eta: float = 0.0,
    **sizes: Any,
) -> Float[np.ndarray, "b height width 3"]:
    """A second pass at a larger size: the images, enlarged, noised to the level of `strength` and denoised again.

    So a model draws at the size that it knows, which decides what is where, and then the details. In windows of
    `window` pixels that overlap by `overlap`, or, by default, in one piece.
    """
    inputs.only(pipe, "high_resolution", 0)
    texts = inputs.check(prompt, solver, images, pipe.factor)
    inputs.check_size(pipe, (height, width))
    if height < images.shape[1] or width < images.shape[2]:
        raise ValueError(
            f"{(height, width)} is smaller than the images of {images.shape[1:3]}; give a larger size"
        )
    settings = _windows(pipe, window, overlap, (False, False)) if window else None
    large = np.asarray(editing.enlarged(jnp.asarray(images), (height, width), "cubic"))
    start, at = verbs.noised(pipe, large, strength, steps, seed, latents)
    seen = (height, width) if settings is None else (settings[0] * pipe.factor,) * 2
    given = inputs.conditions(pipe, texts, negative_prompt, seen, sizes)
    how = dict(eta=eta, windows=settings)
    return verbs.draw(pipe, start, at, *given, {}, solver, guidance, seed, **how)


def _windows(
    pipe: Any, window: int | None, overlap: int | None, wrap: tuple[bool, bool]
) -> tuple[int, int, tuple[bool, bool]]:
    """The settings of `diffusion.windows`, in positions of latents."""
    own = inputs.image_size(pipe, None, None)[0]
    window = own if window is None else window
    overlap = 3 * window // 4 // pipe.factor * pipe.factor if overlap is None else overlap
    inputs.check_size(pipe, (window, overlap))
    if not 0 <= overlap < window:
        raise ValueError(
            f"windows of {window} cannot overlap by {overlap} pixels; give 0 <= overlap < window"
        )
    return window // pipe.factor, overlap // pipe.factor, tuple(wrap)


def with_tiles(pipe: Any, size: int = 64, overlap: int = 16) -> Any:
    """The same with an autoencoder that works in overlapping tiles, in positions of latents, see `codec.tiled`.

    Its memory does not grow with the picture. Tiles see less of it, so that results differ a little from the whole's.

    Raises:
      ValueError: an overlap that is not less than the size, or a model that is `seamless`.
    """
    if not 0 <= overlap < size:
        raise ValueError(f"tiles of {size} cannot overlap by {overlap}; give 0 <= overlap < size")
    if any(pipe.wrap):
        raise ValueError("a seamless model sees the whole picture and cannot work in tiles")
    model = sampling.tiled(pipe.model, size, overlap)
    return dataclasses.replace(pipe, model=model, tiling=(size, overlap))


def seamless(pipe: Any, height: bool = True, width: bool = True) -> Any:
    """The same on a torus: its pictures' edges continue each other along the axes, so that they tile.

    See `nn.seamless`.

    Raises:
      ValueError: no axis, a model with ControlNets, or one that works in tiles.
    """
    if not (height or width):
        raise ValueError("height=False and width=False make nothing seamless; give at least one")
    if pipe.controlnets or pipe.tiling is not None:
        what = "with ControlNets" if pipe.controlnets else "in tiles"
        raise ValueError(f"a model {what} cannot be made seamless")
    wrap = (height, width)
    return dataclasses.replace(pipe, model=latent_diffusion.torus(pipe.model, wrap), wrap=wrap)
