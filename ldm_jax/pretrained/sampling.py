"""What the verbs of a pretrained model run: functions of (params, inputs), each compiled once a shape."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ldm_jax import codec, guided, heatmaps, tiles
from ldm_jax.diffusion import (
    conditions,
    controls,
    diffedit,
    editing,
    gradients,
    guidance,
    inversion,
    keeping,
    samplers,
    solvers,
    windows,
)
from ldm_jax.diffusion.samplers import Solver
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.models import clip
from ldm_jax.nn import prompt_to_prompt, seamless, taps
from ldm_jax.types import Cond, Denoiser, Params


def keys(seed: int, n: int) -> Array:
    return jax.vmap(jax.random.key)(seed + jnp.arange(n))


class Built(NamedTuple):
    """All of a sampler's settings of which another value is another program."""

    solver: str = "ddim"
    leads: bool = False  # whether guidance leads away from a null condition
    own_null: bool = True  # the null condition is the model's, and the negative batch idle
    edits: bool = False  # guidance by text and image
    windows: tuple[Any, ...] | None = None  # size, overlap and wrap of `diffusion.windows`
    maps: bool = False  # also where each token acts, see `heatmaps`
    how: guided.How = guided.CFG  # the kind of guidance
    options: tuple[tuple[str, Any], ...] = ()  # of the solver


class Further(NamedTuple):
    """What guidance beyond the classifier-free reads, see `guided.denoiser`."""

    numbers: dict[str, Any]
    points: samplers.Point | None = None  # the grid that is walked
    log_p: gradients.LogLikelihood | None = None


NOTHING = Further({})


def denoiser(
    model: LatentDiffusion,
    controlnets: tuple[Any, ...],
    built: Built,
    params: Params,
    batch: dict[str, Any],
    negative: dict[str, Any],
    extra: dict[str, Any],
    scales: tuple[Array, Array],
    exchange: prompt_to_prompt.Exchange | None = None,
    further: Further = NOTHING,
) -> tuple[Denoiser, Cond]:
    """The model's denoiser, steered and guided, and the condition; `extra` are further fields of all conditions."""
    batch, how = dict(batch), built.how
    combined, (others, weights) = next(
        ((name, batch.pop(name)) for name in ("AND", "BLEND") if name in batch), (None, ((), None))
    )

    def condition(rows):
        return model.condition(params, batch | rows).replace(**extra)

    cond, others = condition({}), tuple(map(condition, others))
    if combined == "BLEND":
        cond = conditions.blend((cond, *others), list(weights.T))
    model = _changed(model, controlnets, params, exchange)
    beside = guided.Beside(log_p=further.log_p)
    if how.weak is not None:
        weak = how.weak.condition(params["weak"], batch).replace(**extra)
        beside = beside._replace(weak=weak)
    elif built.leads or combined == "AND":
        null = model.null(params, batch) if built.own_null else model.condition(params, negative)
        beside = beside._replace(null=null.replace(**extra))
    if combined == "AND":
        beside = beside._replace(others=others, weights=weights)
    if built.edits and built.leads:
        blind = beside.null.replace(spatial=jnp.zeros_like(beside.null.spatial))
        batched = not how.two_passes
        denoise = guidance.edit(model.denoiser(params), beside.null, blind, *scales, batched)
    else:
        given = (scales[0], further.numbers, further.points)
        denoise = guided.denoiser(model, how, params, beside, *given)
    if built.windows is not None:
        # Around guidance, whose null condition may have a spatial field as well.
        denoise = windows.windows(denoise, *built.windows)
    return denoise, cond


def _changed(
    model: LatentDiffusion,
    controlnets: tuple[Any, ...],
    params: Params,
    exchange: prompt_to_prompt.Exchange | None,
) -> LatentDiffusion:
    """The model whose network has its attention exchanged, and is steered by ControlNets."""

    def steer(net, params):
        # Its attention is its own, also while that of the network is perturbed, as in diffusers' pipelines.
        return taps.apart(lambda *args: net.apply({"params": params}, *args))

    def around(network):
        network = model.around(network) if model.around else network
        if exchange is not None:
            network = prompt_to_prompt.exchanging(network, exchange)
        if controlnets:
            nets = zip(controlnets, params["controls"], strict=True)
            network = controls.with_controls(network, *(steer(*pair) for pair in nets))
        return network

    return model._replace(around=around)


def walker(model: LatentDiffusion, built: Built, eta: Array, kept: dict[str, Any]) -> Solver:
    """The solver by its name and options, with what `kept` has of the data that are edited.

    "known", "mask", maybe "eps", and "way": see `keeping.keeping`.
    """
    noisy = {"eta": eta} if built.solver == "ddim" else {}
    walk = solvers.make(built.solver, model.path, **noisy | dict(built.options))
    fields = ("known", "mask", "eps", "way")
    return keeping.keeping(walk, **{name: kept[name] for name in fields if name in kept})


@functools.lru_cache(maxsize=8)
def sampler(model: LatentDiffusion, controlnets: tuple[Any, ...], built: Built) -> Any:
    """`(params, arrays, batch, negative, extra, start, noise, points, scales, numbers, eta, kept) -> images`.

    Images and maps where these are asked for. `extra` are fields of the condition, `kept` what is kept of edited data,
    see `walker`; also "known" and "mask" alone say what latents are in the end, "rest" is added to them, "cond" are
    fields of the positive condition only, "exchange" is for `nn.prompt_to_prompt`, and "wanted" are rows of what
    gradients lead to. `numbers` are those of the guidance but its `scales`.
    """

    @jax.jit
    def draw(
        params, arrays, batch, negative, extra, start, noise, points, scales, numbers, eta, kept
    ):
        log_p = guided.likelihood(model, built.how, params, arrays, kept.get("wanted"))
        given = (params, batch, negative, extra, scales, kept.get("exchange"))
        further = Further(numbers, points, log_p)
        denoise, cond = denoiser(model, controlnets, built, *given, further)
        cond = cond.replace(**kept.get("cond", {}))
        walk = walker(model, built, eta, kept)
        keep = "x" if built.maps else None
        z, way = samplers.sample(denoise, walk, points, start, noise, cond, keep=keep)
        if "known" in kept:
            z = editing.composite(kept["known"], z, kept["mask"])
        images = model.codec.decode(arrays, z + kept.get("rest", 0))
        if not built.maps:
            return images
        return images, heatmaps.of_steps(model, params, cond, points, way)

    return draw


@functools.lru_cache(maxsize=8)
def inverter(
    model: LatentDiffusion, controlnets: tuple[Any, ...], built: Built, iterations: int
) -> Any:
    """`(params, batch, negative, extra, latents, points, scales) -> (noise, way)`, see `inversion.invert`."""

    @jax.jit
    def invert(params, batch, negative, extra, x, points, scales):
        given = (params, batch, negative, extra, scales)
        denoise, cond = denoiser(model, controlnets, built, *given)
        walk = editing.resting(inversion.implicit(iterations))
        return inversion.invert(denoise, points, x, cond, walk)

    return invert


@functools.lru_cache(maxsize=8)
def friendly(model: LatentDiffusion, controlnets: tuple[Any, ...], built: Built) -> Any:
    """`(params, batch, negative, extra, latents, noise, points, scales, eta) -> inversion.Inverted`."""

    @jax.jit
    def invert(params, batch, negative, extra, x, noise, points, scales, eta):
        given = (params, batch, negative, extra, scales)
        denoise, cond = denoiser(model, controlnets, built, *given)
        walk = walker(model, built, eta, {})
        return inversion.edit_friendly(denoise, walk, points, x, noise, cond)

    return invert


@functools.lru_cache(maxsize=8)
def contrast(model: LatentDiffusion, controlnets: tuple[Any, ...], built: Built, maps: int) -> Any:
    """`(params, batch, other batch, negative, extra, latents, noise, level, scales) -> contrast`, see `diffedit`."""

    @jax.jit
    def contrast(params, batch, other, negative, extra, x, noise, level, scales):
        given = (params, batch, negative, extra, scales)
        denoise, cond = denoiser(model, controlnets, built, *given)
        second = model.condition(params, other).replace(**extra)
        return diffedit.contrast(denoise, level, x, noise, cond, second, maps)

    return contrast


@functools.lru_cache(maxsize=8)
def condition(model: LatentDiffusion) -> Any:
    return jax.jit(model.condition)


@functools.lru_cache(maxsize=8)
def decode(model: LatentDiffusion) -> Any:
    return jax.jit(model.codec.decode)


@functools.lru_cache(maxsize=8)
def encode(
    model: LatentDiffusion,
    network: Any,
    tiling: tuple[int, int] | None = None,
    wrap: tuple[bool, bool] = (False, False),
) -> Any:
    """`(arrays, images) -> latents`, the mean; in tiles and on a torus if asked for, see `tiled`."""

    @jax.jit
    def encode(arrays, x):
        def mean(x, number):
            found = network.apply({"params": arrays["params"]}, x, method="encode")
            return found if isinstance(found, jax.Array) else found.mean  # or of a posterior

        if any(wrap):
            mean = seamless.seamless(mean, wrap)
        if tiling is None:
            return mean(x, 0) * arrays["scale"]
        space = tuple(n // network.factor for n in x.shape[1:3])
        size, overlap = tiling
        parts = tiles.axes(space, size, overlap)
        return tiles.tiled(mean, x, parts, overlap // 4) * arrays["scale"]

    return encode


@functools.lru_cache(maxsize=8)
def tiled(model: LatentDiffusion, size: int, overlap: int) -> LatentDiffusion:
    """The model with its autoencoder in tiles, see `codec.tiled`; the same object for the same model."""
    return model._replace(codec=codec.tiled(model.codec, size, overlap, overlap // 4))


@functools.lru_cache(maxsize=8)
def look(encoder: clip.VisionEncoder) -> Any:
    """`(params, images of any size in [-1, 1]) -> embeddings [b, d]`."""

    @jax.jit
    def look(params, x):
        return encoder.apply({"params": params}, clip.prepared(x, encoder.size)).pooled

    return look


@functools.lru_cache(maxsize=8)
def predict(model: LatentDiffusion) -> Any:
    return jax.jit(lambda params, x, t, cond: model.raw(params)(x, t, cond))
