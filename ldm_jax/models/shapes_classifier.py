"""A small classifier of `shapes` pictures, whose last hidden layer measures them as Inception's does photographs.

It is asked four things, so that its features have to know what a caption can say: the colour and shape that the caption
names first, which colours and shapes there are at all, where each of them is, and how many objects there are.
"""

from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from ldm_jax.models.inception import SPATIAL, Activations

FEATURES = 64


class Answers(NamedTuple):
    """What it says of pictures, beside its activations."""

    activations: Activations  # whose logits are those of the pairs of colour and shape
    present: Float[Array, "b k"]  # logits: of each colour and each shape, whether it is there
    centre: Float[Array, "b k 2"]  # y and x of the colours and shapes, as parts of the sides
    count: Float[Array, "b m"]  # logits of 1, 2, ... objects


class ShapesClassifier(nn.Module):
    """Pictures with values in 0..255, of one size, whose sides 4 divides, -> `Answers`."""

    pairs: int  # of a colour and a shape
    kinds: int  # colours and shapes
    most: int  # objects in a picture

    @nn.compact
    def __call__(self, x: Float[Array, "b h w 3"]) -> Answers:
        x = x / 127.5 - 1
        x = nn.gelu(nn.Conv(32, (4, 4), (2, 2), name="conv1")(x))
        x = nn.gelu(nn.Conv(64, (3, 3), (2, 2), name="conv2")(x))
        x = nn.gelu(nn.Conv(64, (3, 3), name="conv3")(x))
        spatial = x[..., :SPATIAL].reshape(len(x), -1)
        x = nn.gelu(nn.Conv(64, (3, 3), (2, 2), name="conv4")(x))
        pool = nn.gelu(nn.Dense(FEATURES, name="features")(x.reshape(len(x), -1)))
        centre = nn.sigmoid(nn.Dense(2 * self.kinds, name="centre")(pool))
        return Answers(
            Activations(pool, spatial, nn.Dense(self.pairs, name="pair")(pool)),
            nn.Dense(self.kinds, name="present")(pool),
            jnp.reshape(centre, (len(x), self.kinds, 2)),
            nn.Dense(self.most, name="count")(pool),
        )
