"""Bits per dimension: an upper bound on -log2 p(x) of a diffusion model, over the number of values of a picture.

For diffusion on pixels it is the variational bound of `diffusion.bound`, with 256 levels. For latents of a KL
autoencoder it is the bound of both stages together,

    -log p(x) <= E_q(z | x) [ -log p(x | z) + log q(z | x) - log p(z) ]

with the posterior q(z | x) that the second stage was trained on, the diffusion model's variational bound on the density
of latents in place of -log p(z), and for p(x | z) a normal around the decoder's picture, in 256 levels, of one standard
deviation: of `STDS` that which fits all pictures best. The decoder was not trained for that, so expect more bits than
of a model of pixels.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ldm_jax.data import transforms
from ldm_jax.diffusion import bound, grids
from ldm_jax.diffusion.process import Point
from ldm_jax.models.autoencoder import Gaussian
from ldm_jax.pipeline import Pipeline
from ldm_jax.quality import pictures
from ldm_jax.quality.pictures import Pictures
from ldm_jax.training import processes, sharding

STDS = 2.0 ** np.arange(-9.0, 1.0, 0.25)  # of a picture in [-1, 1]
LEAST = 0.01  # the last noisy level, sigma / alpha; that of Ho et al. 2020
STEPS = 1000


def levels(pipeline: Pipeline, steps: int | None) -> Point:
    """The noise levels of the bound: all of a path's table (Ho et al. 2020), or `steps`, uniform in the log-SNR.

    Raises:
      ValueError: fewer than two steps.
    """
    if steps is not None and steps < 2:
        raise ValueError(f"the bound needs at least two steps, not {steps}")
    table = pipeline.model.path.steps
    if table is not None and steps in (None, table):
        return grids.grid(pipeline.model.path, table, "linspace")
    return grids.grid(pipeline.model.path, steps or STEPS, "log_snr", sigma_min=LEAST)


def check(pipeline: Pipeline) -> bool:
    """Whether the model is one of latents.

    Raises:
      ValueError: its codec has no density: codes, or tiles.
    """
    codec, size = pipeline.model.codec, (1, *pipeline.size, 3)
    x = jax.ShapeDtypeStruct(size, jnp.float32)
    z = jax.eval_shape(codec.encode, pipeline.arrays, x, jax.random.key(0))
    if z.shape == size and codec.moments is None:
        return False
    found = codec.moments and jax.eval_shape(codec.moments, pipeline.arrays, x)
    if found is None or found.shape[-1] != 2 * z.shape[-1]:
        raise ValueError(
            "bpd needs a density of the latents, so a model of pixels or of a KL autoencoder, and those of this model "
            "are codes; leave bpd out"
        )
    return True


def figures(
    pipeline: Pipeline,
    of: Pictures,
    conditions: Mapping[str, Any],
    points: Point,
    seed: int,
    size: int = 64,
) -> dict[str, float]:
    """`bpd` of pictures under their conditions, and its parts; `points` are of `levels`."""
    latents = check(pipeline)
    parts = [
        np.asarray(part) for part in _batches(pipeline, of, conditions, points, seed, size, latents)
    ]
    found = np.concatenate(parts).mean(0)
    if not latents:
        prior, transitions, decoder = map(float, found)
        told = dict(bpd_prior=prior, bpd_transitions=transitions, bpd_decoder=decoder)
        return {"bpd": prior + transitions + decoder} | told
    best = int(found[1:].argmin())
    rate, decoder = float(found[0]), float(found[1 + best])
    told = dict(bpd_latents=rate, bpd_decoder=decoder, decoder_std=float(STDS[best]))
    return {"bpd": rate + decoder} | told


def _batches(
    pipeline: Pipeline,
    of: Pictures,
    conditions: Mapping[str, Any],
    points: Point,
    seed: int,
    size: int,
    latents: bool,
) -> Iterator[np.ndarray]:
    """The parts in bits per dimension of pictures, [b parts] a batch."""
    mesh = pipeline.mesh
    chunk = sharding.round_up(min(size, of.count), mesh)
    measure = _of_latents(pipeline) if latents else _of_pixels(pipeline)
    with pictures.bar_of(of.count, "bits per dimension") as bar:
        for start in range(0, of.count, chunk):
            rows = np.arange(start, start + chunk) % of.count  # filled up and cut
            count = min(chunk, of.count - start)
            x = transforms.to_unit(np.stack([of.read(int(i)) for i in rows]))
            batch = jax.tree.map(lambda field: np.asarray(field)[rows], dict(conditions))
            placed = sharding.spread(mesh, {"x": x} | batch)
            key = jax.random.fold_in(jax.random.key(seed), start)
            found = measure(pipeline.params, pipeline.arrays, placed, points, key)
            yield processes.fetch(found)[:count]
            bar.update(count)


def _of_pixels(pipeline: Pipeline) -> Callable[..., Array]:
    model = pipeline.model

    @jax.jit
    def measure(params, arrays, batch, points, key):
        cond = model.condition(params, model.seen(arrays, batch, key))
        found = bound.bits_per_dim(model.denoiser(params), points, batch["x"], key, cond)
        return jnp.stack([found.prior, found.transitions.sum(0), found.decoder], 1)

    return measure


def _of_latents(pipeline: Pipeline) -> Callable[..., Array]:
    model, nll = pipeline.model, bound.discretised()

    @jax.jit
    def measure(params, arrays, batch, points, key):
        x, (for_z, for_bound) = batch["x"], jax.random.split(key)
        mean, logvar = jnp.split(model.codec.moments(arrays, x), 2, axis=-1)
        own = Gaussian(mean, logvar).sample(for_z)
        z = own * arrays["scale"]
        values, bits = x[0].size, jnp.log(2.0)
        cond = model.condition(params, model.seen(arrays, batch, key))
        denoise = model.denoiser(params)
        given = (points, z, for_bound, cond, bound.continuous())
        prior = bound.bits_per_dim(denoise, *given).total * z[0].size / values

        def total(nats):
            return nats.reshape(len(x), -1).sum(1) / (values * bits)

        # The posterior's density at the scaled sample.
        spread = (jnp.square(own - mean) / jnp.exp(logvar) + logvar + jnp.log(2 * jnp.pi)) / 2
        posterior = total(-spread - jnp.log(arrays["scale"]))
        y = model.codec.decode(arrays, z)
        decoders = jax.lax.map(lambda std: total(nll(x, y, std)), jnp.asarray(STDS, jnp.float32))
        return jnp.concatenate([(prior + posterior)[None], decoders]).T

    return measure
