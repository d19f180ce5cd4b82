"""New contents for parts and margins of pictures, as methods of `Pretrained`, which is `pipe` here.

Arguments are those of all `verbs`, and `strength`, masks and `exact` those of `edits`.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from ldm_jax.diffusion import editing, inpainting
from ldm_jax.pretrained import inputs, verbs
from ldm_jax.pretrained.inputs import Hint, Prompts
from ldm_jax.pretrained.verbs import Images, Strength
from ldm_jax.weights import unet

Masks = Float[np.ndarray, "b h w"]

MASK_AT = 0.5  # from here on a mask means: paint here


def check_masks(masks: Masks, images: Images) -> None:
    """Raises: ValueError: masks of another size or number than the images."""
    if masks.shape != images.shape[:3]:
        raise ValueError(
            f"masks of shape {masks.shape} do not fit images of shape {images.shape}; "
            "give [b, h, w] of the same size"
        )


def inpaint(
    pipe: Any,
    prompt: Prompts,
    images: Images,
    masks: Masks,
    negative_prompt: Prompts | None = None,
    *,
    strength: Strength = 1.0,
    repaint: tuple[int, int] | None = None,
    exact: bool = True,
    steps: int = 50,
    guidance: float = 7.5,
    solver: str = "ddim",
    seed: int = 0,
    latents: Any = None,
    hints: Sequence[Hint] = (),
    eta: float = 0.0,
    noises: Any = None,
    **sizes: Any,
) -> Images:
    """New contents where the masks are 1.

    By a model that was trained for it, or by any other: there the known latents are put back at each noise level
    (`diffusion.inpainting`). `repaint=(jump, times)`, such as (10, 10), walks each stretch of `jump` steps so many
    times, so that the new fits the known better, and takes as many times longer (Lugmayr et al. 2022, with the solver
    ddpm).

    Raises:
      ValueError: masks of another size, or `repaint` for a model that was trained to inpaint.
    """
    trained = 1 + pipe.latent_channels
    spatial = unet.channels(pipe.components["unet"].config).spatial
    inputs.only(pipe, "inpaint", trained if spatial else 0)
    texts = inputs.check(prompt, solver, images, pipe.factor)
    size = images.shape[1:3]
    check_masks(masks, images)
    if spatial and repaint is not None:
        raise ValueError(
            "repaint is for models that were not trained to inpaint; leave it out for this one"
        )
    at = verbs.begun(pipe, len(texts), strength, steps)
    given = inputs.conditions(pipe, texts, negative_prompt, size, sizes)
    extra = inputs.controls(pipe, hints, len(texts), size, at)
    grid = at if repaint is None else inpainting.repaint(at, *repaint)
    eps = inputs.noise(pipe, latents, len(texts), seed, size)
    hole = (np.asarray(masks) >= MASK_AT).astype(np.float32)[..., None]
    # Nearest: the first pixel of each block, as in the reference.
    small = hole[:, :: pipe.factor, :: pipe.factor]
    # At full strength nothing is left of the images, as in the reference.
    start = inputs.width(pipe) * eps
    if spatial == 0 or np.min(strength) < 1:
        known = pipe.encode(images)
        full = (np.broadcast_to(strength, len(texts)) == 1)[:, None, None, None]
        start = jnp.where(full, start, editing.noised(at, known, eps))
    if spatial:
        masked = pipe.encode(np.where(hole > 0, 0, images).astype(np.float32))
        extra["spatial"], kept = jnp.concatenate([small, masked], axis=-1), {}
    else:
        kept = {"known": known, "mask": small} | ({"eps": eps} if repaint is None else {})
    noisy = dict(eta=eta, noises=noises, kept=kept)
    drawn = verbs.draw(pipe, start, grid, *given, extra, solver, guidance, seed, **noisy)
    return editing.composite(images, drawn, hole) if exact else drawn


def outpaint(
    pipe: Any,
    prompt: Prompts,
    images: Images,
    margins: tuple[int, int, int, int],
    negative_prompt: Prompts | None = None,
    **options: Any,
) -> Float[np.ndarray, "b height width 3"]:
    """The images with new margins (top, bottom, left, right) in pixels; options are those of `inpaint`.

    Raises:
      ValueError: no margins, or a size with them that the autoencoder's factor does not divide.
    """
    top, bottom, left, right = margins
    if min(margins) < 0 or not any(margins):
        raise ValueError(
            f"margins={margins} add nothing; give (top, bottom, left, right) in pixels"
        )
    inputs.check_size(pipe, (images.shape[1] + top + bottom, images.shape[2] + left + right))
    large, masks = editing.padded(images, ((top, bottom), (left, right)))
    return inpaint(pipe, prompt, large, masks[..., 0], negative_prompt, **options)
