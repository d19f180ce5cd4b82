"""What the verbs of a pretrained model run: functions of (params, inputs), each compiled once a shape."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from ldm_jax.diffusion import controls, guidance, process, samplers, solvers
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.models import clip


def resting(solver: samplers.Solver) -> samplers.Solver:
    """The solver, but a step from a noise level to the same one asks no network and leaves x as it is."""

    def step(denoise, x, p, q, memory, rng):
        moves = (p.alpha != q.alpha) | (p.sigma != q.sigma)
        return lax.cond(
            moves,
            lambda: solver.step(denoise, x, p, q, memory, rng),
            lambda: (x, memory, x),
        )

    return samplers.Solver(solver.init, step)


def keys(seed: int, n: int) -> Array:
    return jax.vmap(jax.random.key)(seed + jnp.arange(n))


@functools.lru_cache(maxsize=8)
def sampler(
    model: LatentDiffusion,
    controlnets: tuple[Any, ...],
    solver: str,
    guided: bool,
    own_null: bool,
    edits: bool,
) -> Any:
    """`(params, arrays, batch, negative batch, fields of the condition, start, noise, points, scales, eta) -> images`.

    `own_null`: the null condition is the model's, and the negative batch idle; `edits`: guidance by text and image.
    """

    def steer(net, params):
        return lambda x, t, cond, hint: net.apply({"params": params}, x, t, cond, hint)

    @jax.jit
    def draw(params, arrays, batch, negative, extra, start, noise, points, scales, eta):
        options = {"eta": eta} if solver == "ddim" else {}
        step = resting(solvers.make(solver, model.path, **options))
        cond = model.condition(params, batch).replace(**extra)
        network = model.raw(params)
        if controlnets:
            nets = zip(controlnets, params["controls"], strict=True)
            network = controls.with_controls(network, *(steer(*pair) for pair in nets))
        denoise = process.make_denoiser(network, model.path, model.target)
        if guided:
            null = model.null(params, batch) if own_null else model.condition(params, negative)
            null = null.replace(**extra)
            if edits:
                blind = null.replace(spatial=jnp.zeros_like(null.spatial))
                denoise = guidance.edit(denoise, null, blind, *scales)
            else:
                denoise = guidance.cfg(denoise, null, scales[0])
        z, _ = samplers.sample(denoise, step, points, start, noise, cond)
        return model.codec.decode(arrays, z)

    return draw


@functools.lru_cache(maxsize=8)
def condition(model: LatentDiffusion) -> Any:
    return jax.jit(model.condition)


@functools.lru_cache(maxsize=8)
def decode(model: LatentDiffusion) -> Any:
    return jax.jit(model.codec.decode)


@functools.lru_cache(maxsize=8)
def encode(model: LatentDiffusion, network: Any) -> Any:
    @jax.jit
    def encode(arrays, x):
        found = network.apply({"params": arrays["params"]}, x, method="encode")
        latents = found if isinstance(found, jax.Array) else found.mean  # or of a posterior
        return latents * arrays["scale"]

    return encode


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
