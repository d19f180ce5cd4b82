"""From what a user gives, prompts, images, sizes and seeds, to what the compiled functions take.

`pipe` is a `Pretrained` everywhere.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Float, Shaped

from ldm_jax.combined import combined
from ldm_jax.diffusion import process, samplers, solvers
from ldm_jax.pretrained import sampling
from ldm_jax.training import sharding
from ldm_jax.types import Control
from ldm_jax.weights import scheduler, unet

Prompts = str | Sequence[str]
IMAGE = "image"  # the field of what an image encoder says of images


class Hint(NamedTuple):
    """What a ControlNet is shown, for the steps from `start` to `end` (fractions of all steps)."""

    images: Float[np.ndarray, "b h w k"]  # mostly [0, 1]
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0


def several(texts: Prompts) -> list[str]:
    return [texts] if isinstance(texts, str) else list(texts)


def same_number(texts: Sequence[str], others: Any, what: str) -> None:
    """Raises: ValueError: not as many of both."""
    if len(texts) != len(others):
        raise ValueError(f"{len(texts)} prompts and {len(others)} {what}; give as many of both")


def ids(pipe: Any, texts: Sequence[str]) -> dict[str, Shaped[np.ndarray, "b n"]]:
    """The rows of each tokenizer ("tokens", "tokens_2"), and weights if asked for; what does not fit is told.

    Raises:
      ValueError: the model reads no text.
    """
    if not pipe.tokenizers:
        raise ValueError("this model reads no text; use a verb without a prompt")
    rows = {}
    for name, tokenizer in pipe.tokenizers.items():
        for text in texts if pipe.chunks else ():
            if left := tokenizer.cut(text, pipe.chunks, pipe.weighted):
                logging.warning("the prompt is too long for the %s, which cuts %r", name, left)
        field = name.replace("tokenizer", "tokens")
        if pipe.weighted:
            rows[field], rows[f"{field}_weights"] = tokenizer.weighted(texts, pipe.chunks)
        else:
            rows[field] = tokenizer(texts, pipe.chunks)
    return rows


def batch(
    pipe: Any,
    texts: Sequence[str],
    size: tuple[int, int] | None = None,
    original_size: tuple[int, int] | None = None,
    crop: tuple[int, int] = (0, 0),
    target_size: tuple[int, int] | None = None,
    aesthetic_score: float = 6.0,
) -> dict[str, Any]:
    """The fields that the conditioner reads; `size` is that of the images, (height, width)."""
    found: dict[str, Any] = ids(pipe, texts)
    if (original_size or target_size or any(crop)) and "sizes" not in pipe.model.fields:
        raise ValueError("this model reads no sizes; original_size, crop and target_size are XL's")
    if "sizes" in pipe.model.fields:
        size = image_size(pipe, None, None) if size is None else size
        scored = pipe.index.get("requires_aesthetics_score")
        last = (aesthetic_score,) if scored else target_size or size
        row = np.array([*(original_size or size), *crop, *last], np.float32)
        found["sizes"] = np.tile(row, (len(texts), 1))
    return {k: v for k, v in found.items() if k.removesuffix("_weights") in pipe.model.fields}


def conditions(
    pipe: Any,
    texts: Sequence[str],
    negative: Prompts | None,
    size: tuple[int, int],
    sizes: dict[str, Any],
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The batch of the prompts and that of the negative ones (None: the model's own null condition).

    Where the model reads several prompts in one (`reading`), the batch has the other prompts and all weights, (batches,
    [b k]), under "AND" or "BLEND".
    """
    n, parts = len(texts), combined(texts) if pipe.combined else None
    columns = [list(texts)] if parts is None else parts.columns
    against = [] if negative is None else several(negative)
    against = against * n if len(against) == 1 else against
    if negative is not None:
        same_number(texts, against, "negative prompts")
    # Together, so that all have as many chunks.
    every = batch(pipe, [*(text for column in columns for text in column), *against], size, **sizes)
    many = len(columns) + (negative is not None)
    split = [{k: v[i * n : (i + 1) * n] for k, v in every.items()} for i in range(many)]
    positive, *others = split[: len(columns)]
    if parts is not None and parts.how is not None:
        positive = positive | {parts.how: (tuple(others), parts.weights)}
    return positive, None if negative is None else split[-1]


def one_prompt(pipe: Any, verb: str, texts: Sequence[str]) -> None:
    """Raises: ValueError: prompts that are several in one, for a verb that takes one."""
    if pipe.combined and (how := combined(texts).how):
        raise ValueError(f"{verb} takes one prompt, and {how} combines several; give them apart")


def points(pipe: Any, steps: int) -> process.Point:
    """The grid of the model's scheduler, or the one of `on_grid`.

    Raises:
      ValueError: as `grids.grid`.
    """
    if pipe.spacing is not None:
        spacing, options = pipe.spacing
        return samplers.grid(pipe.model.path, steps, spacing, **options)
    config = pipe.schedulers["scheduler"]
    to_zero = bool(config.get("set_alpha_to_one", True))
    spacing, offset = scheduler.read(config).spacing, int(config.get("steps_offset", 0))
    options = {"offset": offset} if spacing == "leading" else {}
    return samplers.grid(pipe.model.path, steps, spacing, to_zero, **options)


def image_size(pipe: Any, height: int | None, width: int | None) -> tuple[int, int]:
    """The size asked for, else the one that the model was trained on."""
    default = pipe.components["unet"].config.get("sample_size", 64)
    default = default if isinstance(default, int) else default[0]
    return height or default * pipe.factor, width or default * pipe.factor


def nearest(size: Sequence[int], factor: int) -> tuple[int, ...]:
    """The nearest size that a factor divides."""
    return tuple(max(round(side / factor), 1) * factor for side in size)


def check_size(pipe: Any, size: Sequence[int]) -> None:
    """Raises: ValueError: a size that the autoencoder's factor does not divide."""
    if any(side % pipe.factor for side in size):
        raise ValueError(
            f"images of {tuple(size)} cannot be made: the autoencoder's factor {pipe.factor} must divide both; "
            f"the nearest that works is {nearest(size, pipe.factor)}"
        )


def noise(pipe: Any, latents: Any, n: int, seed: int, size: tuple[int, int]) -> Array:
    """Standard normal noise [n, h/f, w/f, c] for images of this size: given, or that of the seeds.

    Raises:
      ValueError: a size that the factor does not divide, or latents of another shape.
    """
    check_size(pipe, size)
    shape = (n, *(side // pipe.factor for side in size), pipe.latent_channels)
    if latents is None:
        return samplers.noise(sampling.keys(seed, n), shape)
    if latents.shape != shape:
        raise ValueError(f"latents of shape {latents.shape} were given; {shape} is needed")
    return jnp.asarray(latents)


def second_noise(given: Any, shape: tuple[int, ...], seed: int) -> Float[Array, "b *rest"]:
    """Standard normal noise beside that of the latents: given, or that of the seeds.

    Raises:
      ValueError: noise of another shape.
    """
    if given is None:
        keys = jax.vmap(jax.random.split)(sampling.keys(seed, shape[0]))[:, 1]
        return samplers.noise(keys, shape)
    if given.shape != shape:
        raise ValueError(f"noise of shape {given.shape} was given; {shape} is needed")
    return jnp.asarray(given)


def start(pipe: Any, latents: Any, n: int, seed: int, size: tuple[int, int]) -> Array:
    """`noise` at the noisy end of the path."""
    return width(pipe) * noise(pipe, latents, n, seed, size)


def width(pipe: Any) -> Array:
    """How wide data of unit variance are at the noisy end of the path."""
    t = jnp.float32(pipe.model.path.t_max)
    return jnp.hypot(pipe.model.path.alpha(t), pipe.model.path.sigma(t))


def controls(
    pipe: Any, hints: Sequence[Hint], n: int, size: tuple[int, int], at: process.Point
) -> dict[str, Any]:
    """The condition's field `controls` for ControlNets, which steer at the steps whose fraction lies in their interval.

    Raises:
      ValueError: another number of hints than of ControlNets, or hints of another size than the images.
    """
    if len(hints) != len(pipe.controlnets):
        raise ValueError(
            f"{len(hints)} hints for {len(pipe.controlnets)} ControlNets; give one for each "
            "(from_pretrained(..., controlnets=[...]) loads them)"
        )
    if not hints:
        return {}
    t, alpha, sigma = map(np.asarray, at)
    if t.ndim > 1:
        raise ValueError("hints need one strength for all images, and several were given")
    clock = t[:-1][(np.diff(alpha) != 0) | (np.diff(sigma) != 0)] * (pipe.model.path.steps - 1)
    steps = len(clock)  # those that lead on
    found = []
    for hint in hints:
        if hint.images.shape[:3] != (n, *size):
            raise ValueError(
                f"a hint of shape {hint.images.shape} does not fit {n} images of {tuple(size)}; give [b, h, w, k]"
            )
        asked = [i for i in range(steps) if i / steps >= hint.start and (i + 1) / steps <= hint.end]
        lo, hi = (clock[asked[-1]], clock[asked[0]]) if asked else (np.inf, -np.inf)
        found.append(Control(hint.images, *map(jnp.float32, (hint.scale, lo - 0.5, hi + 0.5))))
    return {"controls": tuple(found)}


def only(pipe: Any, verb: str, spatial: int) -> None:
    """Raises: ValueError: the network reads other channels beside the latents than the verb gives, or images."""
    if IMAGE in pipe.model.fields and verb != "variations":
        raise ValueError(f"this is a model for variations of images, which {verb} does not give")
    reads = unet.channels(pipe.components["unet"].config).spatial
    if reads != spatial:
        fits = {
            0: "text_to_image or image_to_image",
            1: "depth_to_image",
            3: "upscale or super_resolution",
        }
        fits |= {pipe.latent_channels: "instruct", pipe.latent_channels + 1: "inpaint"}
        fits |= {} if pipe.tokenizers else {3: "super_resolution"}
        raise ValueError(
            f"this model reads {reads} channels beside the latents and {verb} gives {spatial}; "
            f"it is a model for {fits.get(reads, 'none of the verbs')}"
        )


def check_images(images: Any, factor: int) -> None:
    """Raises: ValueError: images that are not [b, h, w, 3] of floats, or of a size that the factor does not divide."""
    if images.ndim != 4 or images.shape[-1] != 3 or any(n % factor for n in images.shape[1:3]):
        fits = images.ndim == 4 and images.shape[-1] == 3
        hint = f"; the nearest is {nearest(images.shape[1:3], factor)}" if fits else ""
        raise ValueError(
            f"images of shape {images.shape} cannot be encoded; give [b, h, w, 3] with a height and width that the "
            f"autoencoder's factor {factor} divides{hint}"
        )
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images of type {images.dtype} were given; floats in [-1, 1] are needed")


def check_solver(solver: str) -> None:
    """Raises: ValueError: an unknown solver."""
    if solver not in solvers.TABLE:
        raise ValueError(f"there is no solver {solver!r}; the choices are {sorted(solvers.TABLE)}")


def check_noises(solver: str, eta: float, noises: Any, shape: tuple[int, ...]) -> None:
    """`shape` is that of the noise of all steps [steps, b, h/f, w/f, c].

    Raises:
      ValueError: eta for another solver than its own, or noise of another shape.
    """
    if eta and solver != "ddim":
        raise ValueError(f"eta={eta} is for the solver ddim and {solver!r} was asked for")
    if noises is not None and noises.shape != shape:
        raise ValueError(f"noises of shape {noises.shape} were given; {shape} is needed")


def check(prompt: Prompts, solver: str, images: Any = None, factor: int = 1) -> list[str]:
    """The prompts, one for each image.

    Raises:
      ValueError: no prompt, an unknown solver, images that do not fit (see `check_images`) or are not as many.
    """
    texts = several(prompt)
    if not texts:
        raise ValueError("no prompt was given; give at least one prompt, which may be empty")
    check_solver(solver)
    if images is not None:
        check_images(images, factor)
        same_number(texts, images, "images")
    return texts


def place(pipe: Any, arrays: Any) -> Any:
    """Spread over the mesh where the batch divides, else copied to all of it."""
    mesh = pipe.mesh

    def put(x):
        even = np.ndim(x) and np.shape(x)[0] % sharding.rows(mesh) == 0
        layout = sharding.batch_layouts(mesh, x) if even else sharding.replicated(mesh)
        return jax.device_put(x, layout)

    return jax.tree.map(put, arrays)
