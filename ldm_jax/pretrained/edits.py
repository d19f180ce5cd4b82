"""Edits of pictures, as methods of `Pretrained`, which is `pipe` here: inversions and other prompts.

Arguments are those of all `verbs`. `strength` in (0, 1] is the share of the steps that are taken: the smaller, the
closer to the given images; one, or one for each image. Masks are [b, h, w], and from 0.5 on mean: paint here.
`exact` pastes the given pixels where nothing was to be painted; else they have passed the autoencoder.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ldm_jax.diffusion import diffedit as differences
from ldm_jax.diffusion import editing, interpolation, process, solvers
from ldm_jax.pretrained import inputs, sampling, verbs
from ldm_jax.pretrained.inputs import Prompts
from ldm_jax.pretrained.painting import MASK_AT, Masks, check_masks
from ldm_jax.pretrained.verbs import Images, Strength


def invert(
    pipe: Any,
    images: Images,
    prompt: Prompts = "",
    negative_prompt: Prompts | None = None,
    *,
    steps: int = 50,
    guidance: float = 1.0,
    iterations: int = 1,
    **sizes: Any,
) -> Float[Array, "b y x c"]:
    """The latents from which the solver ddim makes these images: DDIM inversion, to be given to `text_to_image`.

    With the same prompt, steps and guidance they come back up to an error of the steps' size; `iterations` of each step
    make it smaller (see `inversion.implicit`). Guidance above 1 makes it larger.
    """
    inputs.only(pipe, "invert", 0)
    texts = _as_many(prompt, images, pipe.factor)
    given = inputs.conditions(pipe, texts, negative_prompt, images.shape[1:3], sizes)
    at = inputs.points(pipe, steps)
    x, _ = _walk_up(pipe, given, images, at, guidance, iterations)
    return x / inputs.width(pipe)


def edit(
    pipe: Any,
    prompt: Prompts,
    images: Images,
    source: Prompts = "",
    negative_prompt: Prompts | None = None,
    *,
    strength: Strength = 0.64,
    steps: int = 100,
    guidance: float = 15.0,
    source_guidance: float = 3.5,
    seed: int = 0,
    noises: Any = None,
    **sizes: Any,
) -> Images:
    """The images, which `source` describes, as `prompt` would have them: edit-friendly inversion.

    The noises that make the images under `source` are found (`inversion.edit_friendly`) and used under `prompt`; with
    the same prompt and guidance it is the image itself, up to the autoencoder. Defaults are those of
    Huberman-Spiegelglas et al. 2024. `noises` [steps + 1, b, h/f, w/f, c] are what the images are noised with, in place
    of the seeds'.
    """
    inputs.only(pipe, "edit", 0)
    texts, sources = (_as_many(p, images, pipe.factor) for p in (prompt, source))
    size, n = images.shape[1:3], len(images)
    at = verbs.begun(pipe, n, strength, steps)
    before = inputs.conditions(pipe, sources, negative_prompt, size, sizes)
    after = inputs.conditions(pipe, texts, negative_prompt, size, sizes)
    x0 = pipe.encode(images)
    if noises is not None and noises.shape != (steps + 1, *x0.shape):
        raise ValueError(
            f"noises of shape {noises.shape} were given; {(steps + 1, *x0.shape)} is needed"
        )
    built = sampling.Built("ddpm", leads=source_guidance != 1.0, own_null=before[1] is None)
    run = sampling.friendly(pipe.model, verbs.modules(pipe), built)
    noise = sampling.keys(seed, n) if noises is None else jnp.asarray(noises)
    scales = (jnp.float32(source_guidance), jnp.float32(1))
    placed = _placed(pipe, before)
    found = run(pipe.params, *placed, {}, x0, noise, at, scales, jnp.float32(0))
    kept = {"rest": found.rest}
    return verbs.draw(
        pipe, found.x_T, at, *after, {}, "ddpm", guidance, seed, noises=found.noises, kept=kept
    )


def diffedit(
    pipe: Any,
    prompt: Prompts,
    images: Images,
    source: Prompts = "",
    negative_prompt: Prompts | None = None,
    *,
    masks: Masks | None = None,
    strength: float = 0.8,
    steps: int = 50,
    guidance: float = 7.5,
    source_guidance: float = 1.0,
    maps: int = 10,
    limit: float = 3.0,
    iterations: int = 1,
    exact: bool = True,
    seed: int = 0,
    **sizes: Any,
) -> Images:
    """The images, which `source` describes, as `prompt` would have them, changed only where the two differ (DiffEdit).

    Where that is, is found from `maps` noises at half of the strength, or given as `masks`; see `diffusion.diffedit`,
    also for `limit`. The rest is inverted under `source` and kept.
    """
    inputs.only(pipe, "diffedit", 0)
    texts, sources = (_as_many(p, images, pipe.factor) for p in (prompt, source))
    inputs.one_prompt(pipe, "diffedit", [*sources, *texts])
    size, n = images.shape[1:3], len(images)
    if masks is not None:
        check_masks(masks, images)
    at = verbs.begun(pipe, n, strength, steps)
    before = inputs.conditions(pipe, sources, negative_prompt, size, sizes)
    after = inputs.conditions(pipe, texts, negative_prompt, size, sizes)
    if masks is None:
        small = find_masks(pipe, after, before, images, strength / 2, steps, guidance, maps, seed)
        small = np.asarray(differences.binarised(small, limit))
        hole = small.repeat(pipe.factor, 1).repeat(pipe.factor, 2)
    else:
        hole = (np.asarray(masks) >= MASK_AT).astype(np.float32)[..., None]
        small = np.asarray(editing.shrunk(hole, pipe.factor))
    x, way = _walk_up(pipe, before, images, at, source_guidance, iterations)
    kept = {"known": way[-1], "mask": small, "way": way}
    drawn = verbs.draw(pipe, x, at, *after, {}, "ddim", guidance, seed, kept=kept)
    return editing.composite(images, drawn, hole) if exact else drawn


def interpolate(
    pipe: Any,
    prompts: Sequence[str],
    n: int = 8,
    negative_prompt: str | None = None,
    *,
    seeds: tuple[int, int] = (0, 1),
    spherical: bool = False,
    steps: int = 50,
    guidance: float = 7.5,
    solver: str = "ddim",
    height: int | None = None,
    width: int | None = None,
    **sizes: Any,
) -> Images:
    """`n` pictures on the way from the first prompt and seed to the second, ends included, as one batch.

    Noises lie on the arc between the two, conditions on the line, or, `spherical`, each token on the arc as well. A
    stochastic solver draws the same noises for all pictures.

    Raises:
      ValueError: other than two prompts or two seeds, or fewer than two pictures.
    """
    inputs.only(pipe, "interpolate", 0)
    texts = inputs.check(prompts, solver)
    inputs.one_prompt(pipe, "interpolate", texts)
    if len(texts) != 2 or len(seeds) != 2 or n < 2:
        raise ValueError(
            f"{len(texts)} prompts, {len(seeds)} seeds and n={n}; give two, two, and at least 2"
        )
    size = inputs.image_size(pipe, height, width)
    shares = jnp.linspace(0, 1, n)
    ends = [inputs.start(pipe, None, 1, seed, size)[0] for seed in seeds]
    first, second = (pipe.encode_text(text, size=size, **sizes) for text in texts)
    mixed = interpolation.between(first, second, shares, spherical)
    fields = {name: getattr(mixed, name) for name in ("vector", "tokens", "mask")}
    given = inputs.conditions(pipe, [texts[0]] * n, negative_prompt, size, sizes)
    start, at = interpolation.frames(*ends, shares), inputs.points(pipe, steps)
    one = jax.random.normal(jax.random.key(seeds[0]), (steps, 1, *start.shape[1:]))
    noises = (
        jnp.broadcast_to(one, (steps, *start.shape)) if solvers.TABLE[solver].stochastic else None
    )
    noisy = dict(noises=noises, kept={"cond": fields})
    return verbs.draw(pipe, start, at, *given, {}, solver, guidance, seeds[0], **noisy)


def find_masks(
    pipe: Any,
    after: tuple[Any, Any],
    before: tuple[Any, Any],
    images: Images,
    strength: float,
    steps: int,
    guidance: float,
    maps: int,
    seed: int,
    noises: Any = None,
) -> Float[Array, "b y x 1"]:
    """`diffusion.diffedit.contrast` between two batches of conditions (`inputs.conditions`), at a strength's level."""
    at = verbs.begun(pipe, len(images), strength, steps)
    level = process.Point(*(a[0] for a in at))
    built = sampling.Built(leads=guidance != 1.0, own_null=after[1] is None)
    run = sampling.contrast(pipe.model, verbs.modules(pipe), built, maps)
    positive, negative = _placed(pipe, after)
    other = inputs.place(pipe, before[0])
    noise = sampling.keys(seed, len(images)) if noises is None else jnp.asarray(noises)
    scales = (jnp.float32(guidance), jnp.float32(1))
    return run(
        pipe.params, positive, other, negative, {}, pipe.encode(images), noise, level, scales
    )


def _walk_up(
    pipe: Any,
    given: tuple[Any, Any],
    images: Images,
    at: process.Point,
    guidance: float,
    iterations: int,
) -> tuple[Array, Array]:
    """Noise, and latents at all levels of the grid, of inverted images."""
    built = sampling.Built(leads=guidance != 1.0, own_null=given[1] is None)
    run = sampling.inverter(pipe.model, verbs.modules(pipe), built, iterations)
    scales = (jnp.float32(guidance), jnp.float32(1))
    return run(pipe.params, *_placed(pipe, given), {}, pipe.encode(images), at, scales)


def _placed(pipe: Any, given: tuple[Any, Any]) -> tuple[Any, Any]:
    """The batch of a condition and that of its null condition, on the devices."""
    positive, negative = given
    both = (positive, positive if negative is None else negative)
    return tuple(inputs.place(pipe, tree) for tree in both)


def _as_many(prompt: Prompts, images: Images, factor: int) -> list[str]:
    """The prompts, one for each image; one prompt is for all of them."""
    texts = inputs.several(prompt)
    texts = texts * len(images) if len(texts) == 1 else texts
    return inputs.check(texts, "ddim", images, factor)
