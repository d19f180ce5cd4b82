"""The diffusion loss, for every path, target, choice of times and weighting:

    E_{x0, eps, t}  weight(t) mean |F_hat(c_in x_t, c_time) - F|^k,      k = 1 (l1) or 2 (l2)

with F = a x0 + b eps, the row of the target. For networks that predict a variance too, a term for it (`learned`).
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ldm_jax.diffusion import learned, process
from ldm_jax.diffusion.process import Data, Path, Target, over
from ldm_jax.diffusion.times import Times
from ldm_jax.diffusion.weightings import Weighting
from ldm_jax.types import Cond, Network

_UNTRAINED = (
    "this network also predicts a variance, and nothing trains it; set objective.bound=0.001, or the network's "
    "variance=False"
)
_NO_VARIANCE = (
    "objective.bound trains a variance, and this network predicts none; set the network's variance=True, or leave "
    "objective.bound out"
)


def diffusion_loss(
    network: Network,
    path: Path,
    target: Target,
    times: Times,
    weight: Weighting,
    kind: Literal["l1", "l2"] = "l2",
    offset_noise: float = 0.0,
    bound: float = 0.0,
) -> Callable[[Array, Data, Cond], tuple[Float[Array, ""], dict[str, Array]]]:
    """A function (rng, x0, cond) -> (loss, {"loss_per_sample": [b], "t": [b]}).

    The loss is the mean of weight(t) times the losses per sample; these are returned without
    weight, so that they compare across weightings (`bin_means`). `offset_noise` adds noise that is
    constant over space, of that standard deviation (Guttenberg 2023), so that a model can learn to
    change the mean of a picture.

    `bound` is for networks that predict a variance: the weight of the variational bound, in bits per dimension and the
    sum over all steps of the path's table, of which every time tells one (Nichol & Dhariwal 2021, eq. 16: 0.001). It
    moves the variance alone.

    Raises:
      ValueError: an unknown kind; an eps target on a path whose noisy end is pure noise; a bound on a path without a
        table. When it is called: a bound and no variance to train, or a variance and no bound.
    """
    process.check(path, target)
    if bound:
        learned.check(path)
    if kind not in ("l1", "l2"):
        raise ValueError(f"there is no {kind=} of loss; the choices are 'l1' and 'l2'")

    def loss(
        rng: Key[Array, ""], x0: Data, cond: Cond
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        of_t, of_eps, of_offset = jax.random.split(rng, 3)
        b, *space, c = x0.shape
        x0 = x0.astype(jnp.float32)
        t = times(of_t, b)
        eps = jax.random.normal(of_eps, x0.shape)
        if offset_noise:
            eps += offset_noise * jax.random.normal(of_offset, (b, *(1 for _ in space), c))
        x_t = process.add_noise(path, x0, eps, t)
        output = network(over(target.c_in(path, t), x_t) * x_t, target.c_time(path, t), cond)
        f, spread = process.parted(output.astype(jnp.float32), x_t)
        error = f - process.target_of(path, target, x0, eps, t)
        per_value = jnp.abs(error) if kind == "l1" else jnp.square(error)
        per_sample = per_value.reshape(b, -1).mean(-1)
        value = (weight(path, target, t) * per_sample).mean()
        if (spread is None) != (not bound):
            raise ValueError(_UNTRAINED if spread is not None else _NO_VARIANCE)
        if spread is not None:
            held = jax.lax.stop_gradient(process.prediction(path, target, x_t, f, t).x0)
            bits = learned.step_bits(path, x0, held, spread, t)
            value += bound * path.steps * bits.mean()
        return value, {"loss_per_sample": per_sample, "t": t}

    return loss


def bin_means(
    losses: Float[Array, " b"], t: Float[Array, " b"], bins: int
) -> Float[Array, " bins"]:
    """The mean loss within each of `bins` equal parts of [0, 1]; NaN where no time fell."""
    index = jnp.clip((t * bins).astype(jnp.int32), 0, bins - 1)
    total = jnp.zeros(bins).at[index].add(losses)
    return total / jnp.zeros(bins).at[index].add(1.0)
