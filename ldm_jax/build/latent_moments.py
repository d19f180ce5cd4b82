"""The statistics of a trained autoencoder's latents, for `python -m ldm_jax.latent_statistics`."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from ldm_jax.build import autoencoder, parts, updates, workdir
from ldm_jax.metrics import moments
from ldm_jax.models import vq
from ldm_jax.training import checkpoints, codebook, sharding


def latent_statistics(
    directory: str | Path, n: int, batch: int, step: int | None = None
) -> Callable[[int], dict[str, Any]]:
    """What measures the latents of the first `n` pictures of a run's validation data, by the seed of their samples.

    Raises:
      ValueError: not the run of an autoencoder, or fewer pictures than `n`.
      FileNotFoundError: no run, or no checkpoint in it.
    """
    config = workdir.read_config(directory)
    kind = workdir.check_config(config)
    if kind != "autoencoder":
        raise ValueError(
            f"{directory} holds a run of kind {kind!r}; latents are those of an autoencoder: give its workdir"
        )
    source = parts.source(config, **parts.data(config)["validation"])
    if n > len(source):
        raise ValueError(f"{source.name} has {len(source)} examples, not {n}; give a smaller --n")
    mesh = sharding.make_mesh(devices=jax.local_devices()[:1])
    shapes = jax.eval_shape(functools.partial(autoencoder.init, config), jax.random.key(0))
    everywhere = jax.tree.map(lambda _: sharding.replicated(mesh), shapes)
    params, at = checkpoints.load_ema(
        directory, shapes, everywhere, step, updates.average_of(config)
    )
    of = autoencoder.model(config)
    fixed = dict(crop="center", flip=False, shuffle=False, repeat=False)
    pictures = parts.batches(config, source, (), batch=1, **fixed)

    @jax.jit
    def encoded(params, x, key):
        z = of.apply({"params": params}, x, key, method="latents")
        if not isinstance(of, vq.VQAutoencoder):
            return z, None
        return z, of.apply({"params": params}, z, method="quantize")[1]

    def measure(seed: int) -> dict[str, Any]:
        found, chosen = None, np.zeros(getattr(of, "codes", 0))
        for start in tqdm(range(0, n, batch), unit="batch"):
            x = np.concatenate([pictures[i]["x"] for i in range(start, min(start + batch, n))])
            filled = np.resize(x, (batch, *x.shape[1:]))  # so that one program encodes all
            key = jax.random.fold_in(jax.random.key(seed), start)
            z, indices = encoded(params["gen"], filled, key)
            rows = np.asarray(z)[: len(x)].reshape(-1, z.shape[-1])
            found = moments.of(rows) if found is None else moments.update(found, rows)
            if indices is not None:
                some = np.asarray(indices)[: len(x)].reshape(-1)
                chosen += np.bincount(some, minlength=len(chosen))
        return _figures(found, chosen) | {"pictures": n, "step": at}

    return measure


def _figures(found: moments.Moments, chosen: np.ndarray) -> dict[str, Any]:
    """Deviations are those of the set, as `numpy.std` has them."""
    variance = np.diag(found.scatter) / found.count
    mean = found.mean.mean()
    std = float(np.sqrt(np.mean(variance + np.square(found.mean - mean))))
    figures = {
        "scale": 1 / std,
        "mean": float(mean),
        "std": std,
        "channel_mean": found.mean.tolist(),
        "channel_std": np.sqrt(variance).tolist(),
    }
    if len(chosen):
        shares = jnp.asarray(chosen / chosen.sum(), jnp.float32)
        figures |= {
            "usage": float(codebook.usage(shares)),
            "perplexity": float(codebook.perplexity(shares)),
        }
    return figures
