"""Larger pictures, by models that were trained for it, as methods of `Pretrained`, which is `pipe` here.

The small images lie on the grid of the latents, so that a picture is larger by the autoencoder's factor, which is four.
Arguments are those of all `verbs`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from ldm_jax.diffusion import process
from ldm_jax.pretrained import inputs, verbs
from ldm_jax.pretrained.inputs import Prompts
from ldm_jax.pretrained.verbs import Images
from ldm_jax.weights import scheduler

MAX_NOISE_LEVEL = 350  # of the x4 upscaler's small images


def upscale(
    pipe: Any,
    prompt: Prompts,
    images: Images,
    negative_prompt: Prompts | None = None,
    *,
    noise_level: int = 20,
    steps: int = 75,
    guidance: float = 9.0,
    solver: str = "ddim",
    seed: int = 0,
    latents: Any = None,
    noise: Any = None,
) -> Float[np.ndarray, "b height width 3"]:
    """Images four times as large; `noise_level` in [0, 350] is how much noise is added to the small ones.

    `noise`, of the images' shape, is in place of that of the seeds.
    """
    inputs.only(pipe, "upscale", 3)
    texts = inputs.check(prompt, solver, images)
    if not 0 <= noise_level <= MAX_NOISE_LEVEL:
        raise ValueError(f"noise_level={noise_level} is outside of 0 to {MAX_NOISE_LEVEL}")
    if not pipe.tokenizers:
        raise ValueError("this model reads no text; use a verb without a prompt: super_resolution")
    if "low_res_scheduler" not in pipe.schedulers:
        raise ValueError("this model has no low_res_scheduler, which says how images are noised")
    path, _ = scheduler.path_and_target(pipe.schedulers["low_res_scheduler"])
    n = len(texts)
    noise = inputs.second_noise(noise, images.shape, seed)
    level = jnp.full((n,), noise_level / (path.steps - 1))
    extra = {
        "spatial": process.add_noise(path, jnp.asarray(images), noise, level),
        "vector": jax.nn.one_hot(jnp.full((n,), noise_level), pipe.model.network.vector),
    }
    size = tuple(side * pipe.factor for side in images.shape[1:3])
    start = inputs.start(pipe, latents, n, seed, size)
    given = inputs.conditions(pipe, texts, negative_prompt, size, {})
    return verbs.draw(
        pipe, start, inputs.points(pipe, steps), *given, extra, solver, guidance, seed
    )


def super_resolution(
    pipe: Any,
    images: Images,
    *,
    steps: int = 100,
    solver: str = "ddim",
    seed: int = 0,
    latents: Any = None,
    eta: float = 0.0,
    noises: Any = None,
) -> Float[np.ndarray, "b height width 3"]:
    """Images four times as large, by a model that reads them and no text (Rombach et al. 2022, section 4.4, LDM-SR).

    Each side of the images must be divisible by what the network halves it to.
    """
    inputs.only(pipe, "super_resolution", 3)
    if pipe.tokenizers:
        raise ValueError("this model reads prompts beside small images; use upscale")
    inputs.check_solver(solver)
    inputs.check_images(images, 1)
    n, small = images.shape[0], images.shape[1:3]
    inputs.check_noises(solver, eta, noises, (steps, n, *small, pipe.latent_channels))
    start = inputs.start(pipe, latents, n, seed, tuple(side * pipe.factor for side in small))
    extra = {"spatial": jnp.asarray(images)}
    at, noisy = inputs.points(pipe, steps), dict(eta=eta, noises=noises)
    return verbs.draw(pipe, start, at, {}, None, extra, solver, 1.0, seed, **noisy)
