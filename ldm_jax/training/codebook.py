"""How a codebook learns: by the loss's gradient, or as the moving average of the latents that choose each entry.

The moving average is online k-means (van den Oord et al. 2017, appendix A.1): of a batch, the share n_k of latents that
chose entry k and the sum m_k of these, per position,

    N_k <- γ N_k + (1 - γ) n_k        M_k <- γ M_k + (1 - γ) m_k        e_k = M_k / N_k

Entries that hardly any latent chooses are dead: no gradient and no latent reaches them any more. They are revived at
latents of the batch (Dhariwal et al. 2020, appendix B.2; Zeghidour et al. 2021, section III-C).

Both are part of the optimizer. What they remember is in its state, so that it is sharded, saved and resumed like Adam's
moments, and a step that is not finite does not touch it. Under `jit` the statistics are those of the global batch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

__all__ = ["average", "gradient"]  # what a config may name

LEAST = 1e-12  # the share below which an entry has no mean any more


class Chosen(NamedTuple):
    """What a batch made of the codebook; micro-batches lie along a first axis `a`."""

    shares: Any  # [k]: of all positions, those that chose the entry
    sums: Any  # [k d]: their latents, summed and divided by the number of all positions
    latents: Any  # [k d]: for each entry one of the batch's latents, drawn at random


class Rule(NamedTuple):
    """How the codebook moves. `step` gives what is added to it instead of the optimizer's own update."""

    init: Callable[[Float[Array, "k d"]], Any]
    # (update by the gradient, state, codebook, chosen) -> (update, state)
    step: Callable[[Array, Any, Float[Array, "k d"], Chosen], tuple[Float[Array, "k d"], Any]]
    by_gradient: bool  # whether the loss has a term for the entries


def histogram(indices: Int[Array, "b *space"], codes: int) -> Float[Array, " k"]:
    """The share of positions that chose each code."""
    return jnp.zeros(codes).at[indices.reshape(-1)].add(1.0) / indices.size


def usage(shares: Float[Array, " k"]) -> Float[Array, ""]:
    """The share of codes that were chosen at all, in [0, 1]."""
    return jnp.mean(shares > 0)


def perplexity(shares: Float[Array, " k"]) -> Float[Array, ""]:
    """exp of the entropy: how many codes there would be if all were chosen alike; from 1 to their number."""
    return jnp.exp(-jnp.sum(jax.scipy.special.xlogy(shares, shares)))


def chosen(
    z: Float[Array, "b *space d"], indices: Int[Array, "b *space"], codes: int, rng: Array
) -> Chosen:
    """The statistics of a batch, without gradient."""
    flat = jax.lax.stop_gradient(z).reshape(-1, z.shape[-1])
    sums = jnp.zeros((codes, flat.shape[-1])).at[indices.reshape(-1)].add(flat) / len(flat)
    drawn = flat[jax.random.randint(rng, (codes,), 0, len(flat))]
    return Chosen(histogram(indices, codes), sums, drawn)


def _dead(shares: Float[Array, " k"], revive: float) -> Array:
    return shares < revive / shares.size


def _one_each(latents: Float[Array, "a k d"]) -> Float[Array, "k d"]:
    """For each entry a latent of one of the micro-batches, in turn."""
    among, codes, _ = latents.shape
    at = jnp.arange(codes)
    return latents[at % among, at]


def _check(decay: float, revive: float) -> None:
    if not 0.0 <= decay < 1.0:
        raise ValueError(f"codebook.decay = {decay} is no decay; give a number from 0 to below 1")
    if not 0.0 <= revive < 1.0:
        raise ValueError(
            f"codebook.revive = {revive} is the share of its fair share below which an entry is dead; give a number "
            "from 0 (never) to below 1"
        )


def gradient(decay: float = 0.99, revive: float = 0.0) -> Rule:
    """The optimizer's own update; entries whose share falls below `revive` / k are put onto latents of the batch.

    Shares are moving averages with `decay`. The published models have no revival.

    Raises:
      ValueError: a decay or a share out of range.
    """
    _check(decay, revive)

    def init(codebook):
        return {"shares": jnp.full(len(codebook), 1 / len(codebook))}

    def step(update, state, codebook, found):
        shares = decay * state["shares"] + (1 - decay) * found.shares.mean(0)
        dead = _dead(shares, revive)
        moved = jnp.where(dead[:, None], _one_each(found.latents) - codebook, update)
        return moved, {"shares": jnp.where(dead, 1 / len(codebook), shares)}

    return Rule(init, step, by_gradient=True)


def average(decay: float = 0.99, revive: float = 0.01) -> Rule:
    """Each entry becomes the moving average of the latents that chose it; gradients do not touch the codebook.

    Entries whose share falls below `revive` / k are put onto latents of the batch, and have a fair share to begin with.

    Raises:
      ValueError: a decay or a share out of range.
    """
    _check(decay, revive)

    def init(codebook):
        return {
            "shares": jnp.full(len(codebook), 1 / len(codebook)),
            "sums": codebook / len(codebook),
        }

    def step(update, state, codebook, found):
        shares = decay * state["shares"] + (1 - decay) * found.shares.mean(0)
        sums = decay * state["sums"] + (1 - decay) * found.sums.mean(0)
        dead, fair = _dead(shares, revive)[:, None], 1 / len(codebook)
        latents = _one_each(found.latents)
        # One that is never chosen stays where it is until its share is too small to be divided by.
        mean = jnp.where(
            shares[:, None] > LEAST, sums / jnp.maximum(shares, LEAST)[:, None], codebook
        )
        state = {
            "shares": jnp.where(dead[:, 0], fair, shares),
            "sums": jnp.where(dead, fair * latents, sums),
        }
        return jnp.where(dead, latents, mean) - codebook, state

    return Rule(init, step, by_gradient=False)


def learnt(tx: optax.GradientTransformation, rule: Rule) -> optax.GradientTransformation:
    """`tx` for all parameters but `params["gen"]["codebook"]`, which moves by the rule; its update takes `chosen`."""
    tx = optax.with_extra_args_support(tx)

    def init(params):
        return {"others": tx.init(params), "codebook": rule.init(params["gen"]["codebook"])}

    def update(updates, state, params, *, chosen, **more):
        updates, others = tx.update(updates, state["others"], params, **more)
        gen = updates["gen"]
        moved, own = rule.step(
            gen["codebook"], state["codebook"], params["gen"]["codebook"], chosen
        )
        updates = updates | {"gen": gen | {"codebook": moved}}
        return updates, {"others": others, "codebook": own}

    return optax.GradientTransformationExtraArgs(init, update)
