"""The vocabulary that every layer shares: what a batch, a condition, a denoiser and a train state are."""

import math
from collections.abc import Callable, Iterator
from typing import Any

from flax import struct
from jaxtyping import Array, Float

Batch = dict[
    str, Array
]  # "x" is the data, [b *space c] in [-1, 1]; the other fields feed conditioners
Params = Any  # a pytree of arrays


class Residuals(struct.PyTreeNode):
    """What a ControlNet adds to a U-Net: one array a skip, finest first, and one for the middle.

    Each has the shape of what it is added to, or a size of 1 along the spatial axes.
    """

    skips: tuple  # of [b *space c]
    mid: Any  # [b *space c]


class Control(struct.PyTreeNode):
    """What one ControlNet is shown, how strongly it steers and when; all of it may be traced."""

    hint: Any  # [b *space k], at the resolution of the data; most are trained on [0, 1]
    scale: Any = 1.0  # scalar or [b]
    lo: Any = -math.inf  # scalar or [b]; it steers for lo <= t <= hi, where t is what the
    hi: Any = math.inf  # network reads, after the target's `c_time`


class Cond(struct.PyTreeNode):
    """What a network is conditioned on, by the way in which it enters the network.

    A pytree's leaves may be shapes or shardings as well as arrays: hence Any, and the shapes in words.
    """

    vector: Any = None  # [b d] joins the time embedding: class, pooled text, sizes
    tokens: Any = None  # [b n d] read by cross-attention: text, boxes
    mask: Any = None  # bool [b n], True where a token may be attended to
    spatial: Any = None  # [b *space c] concatenated to the input's channels
    residuals: Any = None  # Residuals, added within a U-Net
    controls: Any = ()  # a Control for each ControlNet, from which `controls` makes the residuals


class Prediction(struct.PyTreeNode):
    """Both readings of one network output, `x_t = alpha * x0 + sigma * eps`; iterates over these two."""

    x0: Any  # [b *space c]
    eps: Any  # [b *space c]
    spread: Any = (
        None  # [b *space c] of networks that predict a variance too, see `diffusion.learned`
    )

    def __iter__(self) -> Iterator[Any]:
        return iter((self.x0, self.eps))


# (x_t, t, cond) -> the raw output F of a network; t is what the network reads, after the target's `c_time`.
Network = Callable[
    [Float[Array, "b *space c"], Float[Array, " b"], Cond], Float[Array, "b *space c"]
]
# (x_t, t, cond) -> Prediction; t in [0, 1]: 0 is data, 1 is noise.
Denoiser = Callable[[Float[Array, "b *space c"], Float[Array, " b"], Cond], Prediction]
# (params, frozen, batch, rng, step) -> (loss, metrics); `frozen` are arrays that are used but not trained.
Loss = Callable[[Params, Params, Batch, Array, Array], tuple[Float[Array, ""], dict[str, Array]]]


class TrainState(struct.PyTreeNode):
    """All that a run must remember: arrays only. The rng is `fold_in(key(seed), step)`."""

    step: Any  # int32 []
    params: Params
    ema: Params
    opt_state: Any
    skipped: Any  # int32 []: steps in a row that were skipped because they were not finite
