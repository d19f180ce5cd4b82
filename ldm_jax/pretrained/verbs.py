"""What a pretrained model can do, as methods of `Pretrained`, which is `pipe` here.

Arguments that all of them take, and that mean the same everywhere:

    prompt            one, or several; each picture has its own seed: `seed`, `seed` + 1 ...
    negative_prompt   what guidance leads away from; None: the model's own empty prompt
    steps, solver     of sampling; solvers by their names in `diffusion.solvers`
    guidance          scale of classifier-free guidance; 1 is none
    latents           standard normal noise [b, h/f, w/f, c] in place of that of the seeds
    noises            the noise of every step [steps, b, h/f, w/f, c] for a stochastic solver, in place of the seeds'
    eta               of the solver ddim: 0 is deterministic, 1 is ddpm
    hints             an `inputs.Hint` for each ControlNet
    sizes             of XL: `original_size`, `crop`, `target_size` (each (height, width), or (top, left)), and
                      `aesthetic_score` of the refiner; by default the image's own size, uncropped

How they guide and which levels they walk along is up to the pipeline: `guides`.

They return images, and raise ValueError, before any compile, for a model that is not made for the verb, sizes that the
autoencoder's factor does not divide, prompts and images of different number, no prompt, and unknown solvers.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ldm_jax import guided
from ldm_jax.diffusion import editing, process
from ldm_jax.pretrained import guides, inputs, sampling
from ldm_jax.pretrained.inputs import Hint, Prompts

Images = Float[np.ndarray, "b h w 3"]
Strength = float | Sequence[float]


def text_to_image(
    pipe: Any,
    prompt: Prompts,
    negative_prompt: Prompts | None = None,
    *,
    steps: int = 50,
    guidance: float = 7.5,
    solver: str = "ddim",
    seed: int = 0,
    latents: Any = None,
    height: int | None = None,
    width: int | None = None,
    hints: Sequence[Hint] = (),
    eta: float = 0.0,
    noises: Any = None,
    **sizes: Any,
) -> Images:
    """Pictures of prompts, by default of the size that the model was trained on."""
    inputs.only(pipe, "text_to_image", 0)
    texts = inputs.check(prompt, solver)
    if np.ndim(latents) == 4 and height is None and width is None:
        height, width = (n * pipe.factor for n in latents.shape[1:3])
    size = inputs.image_size(pipe, height, width)
    start = inputs.start(pipe, latents, len(texts), seed, size)
    at = inputs.points(pipe, steps)
    given = inputs.conditions(pipe, texts, negative_prompt, size, sizes)
    extra = inputs.controls(pipe, hints, len(texts), size, at)
    noisy = dict(eta=eta, noises=noises)
    return draw(pipe, start, at, *given, extra, solver, guidance, seed, **noisy)


def unconditional(
    pipe: Any,
    n: int = 1,
    *,
    steps: int = 50,
    solver: str = "ddim",
    seed: int = 0,
    latents: Any = None,
    height: int | None = None,
    width: int | None = None,
) -> Images:
    """`n` pictures by a model without condition, by default of the size that it was trained on."""
    inputs.only(pipe, "unconditional", 0)
    inputs.check_solver(solver)
    tokens = pipe.components["unet"].kind == "UNet2DConditionModel"
    if reads := list(pipe.model.fields) or ["tokens"] * tokens:
        raise ValueError(
            f"this model reads {reads}, and unconditional gives nothing to read; use text_to_image"
        )
    if n < 1:
        raise ValueError(f"n={n} pictures cannot be made; give at least 1")
    start = inputs.start(pipe, latents, n, seed, inputs.image_size(pipe, height, width))
    return draw(pipe, start, inputs.points(pipe, steps), {}, None, {}, solver, 1.0, seed)


def image_to_image(
    pipe: Any,
    prompt: Prompts,
    images: Images,
    negative_prompt: Prompts | None = None,
    *,
    strength: Strength = 0.8,
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
    """Pictures after other pictures: these, noised to the level of `strength` in (0, 1], and denoised by the prompt.

    Of `steps` the last strength * steps are taken; several strengths are one for each image.
    """
    inputs.only(pipe, "image_to_image", 0)
    texts = inputs.check(prompt, solver, images, pipe.factor)
    size = images.shape[1:3]
    # Before anything is encoded.
    small = (side // pipe.factor for side in size)
    inputs.check_noises(solver, eta, noises, (steps, len(texts), *small, pipe.latent_channels))
    start, at = noised(pipe, images, strength, steps, seed, latents)
    given = inputs.conditions(pipe, texts, negative_prompt, size, sizes)
    extra = inputs.controls(pipe, hints, len(texts), size, at)
    noisy = dict(eta=eta, noises=noises)
    return draw(pipe, start, at, *given, extra, solver, guidance, seed, **noisy)


def depth_to_image(
    pipe: Any,
    prompt: Prompts,
    images: Images,
    depth: Float[np.ndarray, "b y x"],
    negative_prompt: Prompts | None = None,
    *,
    strength: Strength = 0.8,
    steps: int = 50,
    guidance: float = 7.5,
    solver: str = "ddim",
    seed: int = 0,
    latents: Any = None,
) -> Images:
    """`image_to_image` of a model that keeps the depth (of any size and scale, larger is nearer) of the images."""
    inputs.only(pipe, "depth_to_image", 1)
    texts = inputs.check(prompt, solver, images, pipe.factor)
    inputs.same_number(texts, depth, "depth maps")
    if depth.ndim != 3:
        raise ValueError(f"depth maps of shape {depth.shape} were given; give [b, y, x]")
    start, at = noised(pipe, images, strength, steps, seed, latents)
    small = jax.image.resize(depth, start.shape[:3], "cubic", antialias=False)
    low, high = (f(small, axis=(1, 2), keepdims=True) for f in (jnp.min, jnp.max))
    extra = {"spatial": (2 * (small - low) / jnp.maximum(high - low, 1e-8) - 1)[..., None]}
    given = inputs.conditions(pipe, texts, negative_prompt, images.shape[1:3], {})
    return draw(pipe, start, at, *given, extra, solver, guidance, seed)


def instruct(
    pipe: Any,
    prompt: Prompts,
    images: Images,
    negative_prompt: Prompts | None = None,
    *,
    steps: int = 100,
    guidance: float = 7.5,
    image_guidance: float = 1.5,
    solver: str = "ddim",
    seed: int = 0,
    latents: Any = None,
) -> Images:
    """The images, changed as the prompts tell (Brooks et al. 2023, InstructPix2Pix).

    `guidance` follows the text, `image_guidance` the image (their eq. 3).
    """
    inputs.only(pipe, "instruct", pipe.latent_channels)
    guides.only_scales(pipe, "instruct")
    texts = inputs.check(prompt, solver, images, pipe.factor)
    size = images.shape[1:3]
    start, at = inputs.start(pipe, latents, len(texts), seed, size), inputs.points(pipe, steps)
    given = inputs.conditions(pipe, texts, negative_prompt, size, {})
    extra = {"spatial": pipe.encode(images) / pipe.arrays["scale"]}  # here latents are not scaled
    return draw(pipe, start, at, *given, extra, solver, guidance, seed, image_guidance)


def noised(
    pipe: Any,
    images: Images,
    strength: Strength,
    steps: int,
    seed: int,
    latents: Any,
) -> tuple[Array, process.Point]:
    """The latents of images at the noise level of a strength, and the grid from there, as long as the whole."""
    at = begun(pipe, len(images), strength, steps)
    noise = inputs.noise(pipe, latents, len(images), seed, images.shape[1:3])
    return editing.noised(at, pipe.encode(images), noise), at


def begun(pipe: Any, n: int, strength: Strength, steps: int) -> process.Point:
    """The grid from a strength, one or one for each of n images, on."""
    taken = editing.taken(steps, strength)
    if taken.ndim and len(taken) != n:
        raise ValueError(f"{len(taken)} strengths and {n} images; give one, or as many of both")
    return editing.cut(inputs.points(pipe, steps), taken)


def draw(
    pipe: Any,
    start: Array,
    at: process.Point,
    positive: dict[str, Any],
    negative: dict[str, Any] | None,
    extra: dict[str, Any],
    solver: str,
    scale: float,
    seed: int,
    image_scale: float | None = None,
    eta: float = 0.0,
    noises: Any = None,
    kept: dict[str, Any] | None = None,
    windows: tuple[Any, ...] | None = None,
    maps: bool = False,
) -> Any:
    """What all verbs end with: from `start` down the grid, under batches and further fields of the condition.

    Images, or with `maps` a pair of them and of where each token acts.
    """
    inputs.check_noises(solver, eta, noises, (len(at.t) - 1, *start.shape))
    guide, several = pipe.guide, "AND" in positive
    guides.check(pipe, at, several)
    how = guide.how
    if how.name == "auto":
        if negative is not None:
            raise ValueError(
                "autoguidance leads away from a weaker model and not from a negative prompt; give one of them"
            )
        how = dataclasses.replace(how, name="cfg", weak=None) if scale == 1.0 else how
    built = sampling.Built(
        solver,
        leads=scale != 1.0 or image_scale is not None,
        own_null=negative is None,
        edits=image_scale is not None,
        windows=windows,
        maps=maps,
        how=how,
        options=tuple(sorted(pipe.options.get(solver, {}).items())),
    )
    run = sampling.sampler(pipe.model, modules(pipe), built)
    given = (positive, positive if negative is None else negative, extra, start)
    placed = [inputs.place(pipe, tree) for tree in given]
    scales = (jnp.float32(scale), jnp.float32(1.0 if image_scale is None else image_scale))
    noise = sampling.keys(seed, len(start)) if noises is None else jnp.asarray(noises)
    wanted = guides.wanted(pipe, len(start))
    kept = (kept or {}) | ({} if wanted is None else {"wanted": inputs.place(pipe, wanted)})
    last = (noise, at, scales, guided.traced(guide.numbers), jnp.float32(eta), kept)
    params = {**pipe.params, **guide.params}
    return jax.tree.map(np.asarray, run(params, pipe.arrays, *placed, *last))


def modules(pipe: Any) -> tuple[Any, ...]:
    """The networks of the ControlNets."""
    return tuple(net.module for net in pipe.controlnets)
