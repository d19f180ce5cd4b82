"""Pictures after what an image encoder sees in other pictures: their embedding, in place of words or beside them.

Two kinds of model read it. Image variation (Pinkney 2022) has it as the only token. Stable unCLIP reads a prompt, and
the embedding as a vector, with noise, and with the noise's level as a sinusoid of the same width; in training all
levels occurred, so that a level says how closely the picture follows the embedding.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ldm_jax.diffusion import process
from ldm_jax.models import clip
from ldm_jax.nn import embeddings
from ldm_jax.pretrained import inputs, sampling, verbs
from ldm_jax.pretrained.inputs import Prompts
from ldm_jax.weights import scheduler


def encode_image(pipe: Any, images: Float[Any, "b h w c"]) -> Float[Array, "b d"]:
    """Embeddings of images in [-1, 1] of any size, whose middle square is seen.

    Raises:
      ValueError: a model without an image encoder, or one that wants images with another mean and deviation.
    """
    if "image_encoder" not in pipe.components:
        raise ValueError("this model has no image encoder; it is not for variations of images")
    for key, ours in (("image_mean", clip.MEAN), ("image_std", clip.STD)):
        theirs = pipe.processors.get("feature_extractor", {}).get(key, ours)
        if not np.allclose(theirs, ours):
            raise ValueError(
                f"the feature extractor has {key}={theirs}; we have CLIP's only: {ours}"
            )
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images of shape {images.shape} cannot be seen; give [b, h, w, 3]")
    look = sampling.look(pipe.components["image_encoder"].module)
    return look(pipe.vision["image_encoder"], inputs.place(pipe, images))


def variations(
    pipe: Any,
    images: Float[np.ndarray, "b h w 3"],
    prompt: Prompts = "",
    negative_prompt: Prompts | None = None,
    *,
    noise_level: int = 0,
    noise: Any = None,
    steps: int = 50,
    guidance: float = 7.5,
    solver: str = "ddim",
    seed: int = 0,
    latents: Any = None,
    height: int | None = None,
    width: int | None = None,
) -> Float[np.ndarray, "b height width 3"]:
    """One picture after each of the images, which may have any size.

    Prompts and `noise_level` are for Stable unCLIP: a level is an entry of its table of noise, 0 to 999, and `noise`
    [b, d], of the embeddings' shape, is in place of that of the seeds. Other arguments are those of all `verbs`.

    Raises:
      ValueError: see `encode_image` and `verbs`; or a prompt or a noise level for a model that reads none.
    """
    inputs.only(pipe, "variations", 0)
    inputs.check_solver(solver)
    embedding = encode_image(pipe, images)
    n, size = len(images), inputs.image_size(pipe, height, width)
    if not pipe.tokenizers:
        if prompt or negative_prompt or noise_level or noise is not None:
            raise ValueError(
                "this model reads nothing but the images; leave out the prompts and the noise level"
            )
        positive, negative = {}, None
    else:
        texts = inputs.several(prompt)
        texts = texts * n if len(texts) == 1 else texts
        inputs.same_number(texts, images, "images")
        embedding = _noised(pipe, embedding, noise_level, noise, seed)
        positive, negative = inputs.conditions(pipe, texts, negative_prompt, size, {})
    positive[inputs.IMAGE] = embedding
    if negative is not None:
        negative[inputs.IMAGE] = jnp.zeros_like(embedding)
    start = inputs.start(pipe, latents, n, seed, size)
    at = inputs.points(pipe, steps)
    return verbs.draw(pipe, start, at, positive, negative, {}, solver, guidance, seed)


def _noised(
    pipe: Any, embedding: Float[Array, "b d"], level: int, noise: Any, seed: int
) -> Float[Array, "b e"]:
    """The embeddings, noised where they are normal, with the sinusoid of the level beside them."""
    path, _ = scheduler.path_and_target(pipe.schedulers["image_noising_scheduler"])
    if not 0 <= level < path.steps:
        raise ValueError(f"noise_level={level} is outside of 0 to {path.steps - 1}")
    n = len(embedding)
    noise = inputs.second_noise(noise, embedding.shape, seed)
    params = {"params": pipe.vision["image_normalizer"]}
    module = pipe.components["image_normalizer"].module
    x = module.apply(params, embedding.astype(jnp.float32))
    x = process.add_noise(path, x, noise, jnp.full((n,), level / (path.steps - 1)))
    x = module.apply(params, x, method="inverse")
    wave = embeddings.sinusoid(jnp.full((n,), float(level)), x.shape[1])
    return jnp.concatenate([x, wave], axis=1)
