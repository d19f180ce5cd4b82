"""A trained model with the user's verbs: conditions and seeds in, data out, in one compiled program a shape."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float
from jax.sharding import Mesh

from ldm_jax import conditioners, types
from ldm_jax.codec import Codec
from ldm_jax.diffusion import guidance, process, samplers
from ldm_jax.training import sharding


class Networks(NamedTuple):
    """The parts that do not change while a model is trained or sampled; `params` of both are passed beside them."""

    network: nn.Module
    conditioner: nn.Module | None
    codec: Codec
    path: process.Path
    target: process.Target
