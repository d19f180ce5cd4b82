"""A latent diffusion model: which network, conditioner, codec, path and target belong together (Rombach et al. 2022).

It holds no arrays. Its functions take `params = {"network": ..., "conditioner": ...}`, which are trained, and the
arrays of the codec, which are not.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
from flax import linen as nn
from jaxtyping import Array

from ldm_jax import conditioners
from ldm_jax.codec import Codec
from ldm_jax.diffusion import process
from ldm_jax.nn import seamless
from ldm_jax.types import Batch, Cond, Denoiser, Network, Params

# Fields that are pictures which are given: no null condition is without them, since guidance leads away from words.
PICTURES = ("small", "hole", "masked")


class LatentDiffusion(NamedTuple):
    network: nn.Module
    conditioner: nn.Module | None  # None: unconditional
    codec: Codec
    path: process.Path
    target: process.Target
    around: Callable[[Network], Network] | None = None  # what changes the network from outside
    blank: float = 0.0  # what stands where a picture is hidden

    @property
    def fields(self) -> tuple[str, ...]:
        """The batch fields that the conditioner reads."""
        return () if self.conditioner is None else self.conditioner.fields

    def init(self, key: Array, latents: Array, batch: Batch) -> Params:
        """Fresh parameters for latents [b *space c] and the conditions in `batch`."""
        of_network, of_conditioner = jax.random.split(key)
        params, cond = {}, Cond()
        if self.conditioner is not None:
            cond, variables = self.conditioner.init_with_output(of_conditioner, batch)
            params["conditioner"] = variables.get("params", {})
        t = jax.numpy.zeros(latents.shape[:1])
        params["network"] = self.network.init(of_network, latents, t, cond)["params"]
        return params

    def condition(self, params: Params, batch: Batch, drop: dict[str, Array] | None = None) -> Cond:
        """The condition of a batch; rows of a field that `drop` marks get the null condition instead."""
        if self.conditioner is None:
            return Cond()
        return self.conditioner.apply({"params": params["conditioner"]}, batch, drop)

    def null(self, params: Params, batch: Batch) -> Cond:
        """The null condition: everything dropped but `PICTURES`."""
        size = next(iter(batch.values())).shape[0]
        dropped = [field for field in self.fields if field not in PICTURES]
        return self.condition(params, batch, conditioners.drop_all(dropped, size))

    def seen(self, arrays: Params, batch: Batch, key: Array) -> Batch:
        """The batch with the latents of what is left of its pictures, "masked", if the conditioner reads them.

        What is left of "x" where "hole" is 0, and `blank` elsewhere (Rombach et al. 2022, section 4.5).
        """
        if "masked" not in self.fields:
            return batch
        left = batch["x"] * (1 - batch["hole"]) + self.blank * batch["hole"]
        return batch | {"masked": self.codec.encode(arrays, left, key)}

    def raw(self, params: Params, dropout: Array | None = None) -> Network:
        """The network as a function; with a key for `dropout` it is in training mode."""

        def network(x_t, t, cond):
            rngs = None if dropout is None else {"dropout": dropout}
            variables = {"params": params["network"]}
            return self.network.apply(variables, x_t, t, cond, train=dropout is not None, rngs=rngs)

        return self.around(network) if self.around else network

    def denoiser(self, params: Params) -> Denoiser:
        return process.make_denoiser(self.raw(params), self.path, self.target)


@functools.lru_cache(maxsize=8)
def torus(model: LatentDiffusion, wrap: bool | tuple[bool, ...] = True) -> LatentDiffusion:
    """The model whose data's edges continue each other, along all axes or those with `wrap`, see `nn.seamless`.

    The same object for the same model.
    """
    encode, decode = (seamless.seamless(f, wrap) for f in model.codec[:2])
    codec = model.codec._replace(encode=encode, decode=decode)
    return model._replace(codec=codec, around=functools.partial(seamless.seamless, wrap=wrap))
