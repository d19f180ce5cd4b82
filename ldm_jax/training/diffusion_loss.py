"""The loss of the second stage: encode with the frozen codec, drop conditions, and regress the target."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from ldm_jax import conditioners
from ldm_jax.diffusion import objectives
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.types import Loss

BINS = 4  # the loss is also logged for each quarter of the times


def diffusion_loss(
    model: LatentDiffusion,
    objective: Callable[..., Any],
    drop: float | Mapping[str, float] = 0.1,
    train: bool = True,
    together: Sequence[str] = (),
) -> Loss:
    """A Loss over the parameters of network and conditioner; `frozen` are the arrays of the codec.

    `objective(network)` is a loss of (rng, x0, cond), e.g. `objectives.diffusion_loss` with all but its network bound.
    `drop` is the probability with which a condition is replaced by the null condition, for all fields or by field
    (Ho & Salimans 2022); fields that are dropped `together`, such as two encodings of one caption, follow the first of
    them. `train=False` leaves the network's own drop-out off.
    """

    def loss(params, frozen, batch, rng, step):
        for_codec, for_drop, for_noise, for_dropout = jax.random.split(rng, 4)
        x0 = jax.lax.stop_gradient(model.codec.encode(frozen, batch["x"], for_codec))
        drops = conditioners.draw_drops(for_drop, model.fields, drop, x0.shape[0])
        drops |= {field: drops[together[0]] for field in together}
        batch = model.seen(frozen, batch, jax.random.fold_in(for_codec, 1))
        cond = model.condition(params, batch, drops)
        value, parts = objective(model.raw(params, for_dropout if train else None))(
            for_noise, x0, cond
        )
        bins = objectives.bin_means(parts["loss_per_sample"], parts["t"], BINS)
        return value, {f"loss_t{i}": bins[i] for i in range(BINS)}

    return loss


def with_frozen(f: Callable[..., Any]) -> Callable[..., Any]:
    """`f(params, arrays, ...)` of a whole model as a function of what is trained and what is not.

    The latter is {"params": the other parameters, "arrays": the codec's}.
    """

    def whole(params, frozen, *rest):
        return f(params | frozen["params"], frozen["arrays"], *rest)

    return whole
