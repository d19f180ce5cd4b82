"""The variance of a step, learned (Nichol & Dhariwal 2021, sections 3.1 and 3.2).

Two variances bound that of a step from a noise level p to a cleaner one q: that of the posterior q(x_q | x_p, x0), the
"small" one, and that of the noising step from q to p, the "large" one. A network with twice the channels of its data
gives, beside F, a number s for each value that says where between them, -1 small and 1 large:

    log variance = (1 + s) / 2 log large + (1 - s) / 2 log small

s is learned by the bound on -log p(x0) of the chain of a table's entries, one entry at a time, with F held still:
F is learned by the plain loss, and the bound is too noisy for it.
"""

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from ldm_jax.diffusion import bound
from ldm_jax.diffusion.process import (
    Data,
    Path,
    Point,
    Times,
    concrete,
    over,
    posterior,
    transition,
)


def variance(spread: Data | None, small: ArrayLike, large: ArrayLike) -> Data:
    """The variance of a step, between these two; 0 where the small one is 0.

    Raises:
      ValueError: the network gave no s.
    """
    if spread is None:
        raise ValueError(
            "a learned variance is asked for and the network predicts none, or its guidance has lost it; take the "
            "solver ddpm with variance='small' or 'large', or a network with variance=True"
        )
    share = (1 + spread) / 2
    return jnp.exp(share * jnp.log(large) + (1 - share) * jnp.log(small))


def check(path: Path) -> None:
    """Raises ValueError unless the path has a table, whose entries are the chain."""
    if path.steps is None:
        raise ValueError(
            "the bound that trains a variance is that of a table's steps, and this path has none; use the path ddpm, "
            "or leave objective.bound out"
        )


def step_bits(
    path: Path,
    x0: Data,
    estimate: Data,
    spread: Data,
    t: Times,
    decoder: bound.Decoder | None = None,
) -> Float[Array, " b"]:
    """One term of the bound in bits per dimension: that of the step from the entry at t to the next cleaner one.

    KL(q(x_q | x_p, x0) || p(x_q | x_p)), and in the step from entry 0 to clean data -log p(x0 | x_p) by `decoder`
    (default: `bound.discretised()`, as in the authors' code, where the small variance is that of the step before).
    `estimate` is x0 by the network. Times between entries go one entry's distance down.
    """
    check(path)
    decoder = decoder or bound.discretised()
    gap = 1.0 / (path.steps - 1)
    last = t < gap / 2
    below = jnp.maximum(t - gap, 0.0)
    p = Point(t, path.alpha(t), path.sigma(t))
    q = Point(
        below, jnp.where(last, 1.0, path.alpha(below)), jnp.where(last, 0.0, path.sigma(below))
    )
    of_x0, _, small = posterior(p, q)  # both means contain the same share of x_p
    large = transition(p, q)[1]
    small = jnp.where(last, _first_small(path), small)
    last, of_x0, small, large = (over(a, x0) for a in (last, of_x0, small, large))
    model = variance(spread, small, large)
    kl = bound.gaussian_kl(of_x0 * x0, small, of_x0 * estimate, model)
    # Where it is not looked at the decoder gets what has a finite gradient.
    mean, std = jnp.where(last, estimate, x0), jnp.where(last, jnp.sqrt(model), 1.0)
    nats = jnp.where(last, decoder(x0, mean, std), kl)
    return nats.reshape(len(x0), -1).mean(-1) / jnp.log(2.0)


def _first_small(path: Path) -> float:
    """The small variance of the step from entry 1 to entry 0."""
    with concrete():
        t = jnp.arange(2) / (path.steps - 1.0)
        alpha, sigma = path.alpha(t), path.sigma(t)
        q, p = (Point(t[i], alpha[i], sigma[i]) for i in range(2))
        return float(np.asarray(posterior(p, q)[2]))
