"""Between two samples: noises and conditions on the way from one to the other, as a batch."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from ldm_jax.diffusion.process import over
from ldm_jax.types import Cond

PARALLEL = 1e-4  # below this sine two vectors are taken for parallel


def slerp(a: Array, b: Array, share: ArrayLike, axes: tuple[int, ...] | None = None) -> Array:
    """Spherical interpolation (Shoemake 1985): `share` of the way from a (0) to b (1), along the arc between them.

    Noise between two normal noises is as long as they are, where the straight line between is shorter by up to
    1 / sqrt(2), which a model has not seen. `axes` are those of one vector; by default all. Where both are parallel,
    the line.
    """

    def norm(x):
        return jnp.sqrt(jnp.sum(jnp.square(x), axes, keepdims=True))

    w = jnp.asarray(share, a.dtype)
    cosine = jnp.sum(a * b, axes, keepdims=True) / jnp.maximum(norm(a) * norm(b), 1e-12)
    angle = jnp.arccos(jnp.clip(cosine, -1.0, 1.0))
    sine = jnp.sin(angle)
    flat = sine < PARALLEL
    safe = jnp.where(flat, 1.0, sine)
    of_a, of_b = (jnp.where(flat, s, jnp.sin(s * angle) / safe) for s in (1 - w, w))
    return of_a * a + of_b * b


def frames(
    a: Float[Array, "*space c"], b: Float[Array, "*space c"], shares: Float[Array, " n"]
) -> Float[Array, "n *space c"]:
    """`slerp` between two noises at several shares; at 0 and 1 they are a and b, to the bit."""
    return jax.vmap(lambda w: slerp(a, b, w))(shares)


def between(first: Cond, second: Cond, shares: Float[Array, " n"], spherical: bool = False) -> Cond:
    """Conditions on the way between two of one row each: a batch of n.

    On the line, or each token's vector on the arc. Tokens that either has count; controls are not interpolated.

    Raises:
      ValueError: conditions of different structure, or of more rows than one.
    """
    if jax.tree.structure(first) != jax.tree.structure(second):
        raise ValueError(
            "the two conditions have not the same fields; make both with one conditioner"
        )

    def mix(a, b):
        if a.shape != b.shape or a.shape[0] != 1:
            raise ValueError(
                f"conditions of shapes {a.shape} and {b.shape} cannot be mixed; give one row each, equally long"
            )
        if a.dtype == bool:
            return jnp.broadcast_to(a | b, (len(shares), *a.shape[1:]))
        w = over(shares, a).astype(a.dtype)
        return slerp(a, b, w, (-1,)) if spherical else (1 - w) * a + w * b

    return jax.tree.map(mix, first, second)
