"""Prompt-to-prompt (Hertz et al. 2023): an edited prompt is drawn with the source prompt's cross-attention.

What a position takes of each word decides the layout. Source and edited prompt are drawn as one batch, from the same
noise; where they read words, the edited one takes the source's maps, carried over to its own words:

    maps = (share (source maps @ align) + (1 - share) own maps) weigh

"Replace" (a word for another) has a share of 1 everywhere, "refine" (words are added) a share of 0 at the new ones,
"reweight" other factors `weigh` than 1. Maps between positions can be the source's for some steps too, which keeps more
of the shapes. All of it by `taps`, from outside: no module knows.
"""

import difflib
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float

from ldm_jax.nn import attend, taps


class Exchange(struct.PyTreeNode):
    """What the edited rows take of the source's; all arrays may be traced. Times are what the network reads."""

    align: (
        Any  # [b m n]: how much of each of the source's m tokens becomes which of the n edited ones
    )
    share: Any  # [b n] in [0, 1]: of the source's maps at each of the edited tokens
    weigh: Any  # [b n]: factors of the maps
    cross_until: (
        Any  # scalar: from the noisy end down to this time the maps of words are the source's ...
    )
    self_until: Any  # ... and down to this one those between positions ...
    self_size: int = struct.field(
        pytree_node=False, default=16**2
    )  # ... where they are at most so many


def alignment(
    source: Sequence[int], edited: Sequence[int], refine: bool = False
) -> tuple[Float[np.ndarray, "m n"], Float[np.ndarray, " n"]]:
    """`align` and `share` of two rows of token ids: what is common belongs together, and what was put for it.

    A word of several tokens that stands for another gives each of its tokens an equal part, as in the paper's code.
    With `refine` words that differ keep maps of their own.
    """
    align, share = np.zeros((len(source), len(edited)), np.float32), np.zeros(len(edited))
    matcher = difflib.SequenceMatcher(None, list(source), list(edited), autojunk=False)
    for kind, a, a_end, b, b_end in matcher.get_opcodes():
        if kind == "equal":
            align[np.arange(a, a_end), np.arange(b, b_end)] = 1
            share[b:b_end] = 1
        elif kind == "replace" and not refine:
            align[a:a_end, b:b_end] = 1 / (b_end - b)
            share[b:b_end] = 1
    return align, share.astype(np.float32)


def exchanging(network: Callable[..., Any], exchange: Exchange) -> Callable[..., Any]:
    """The network (x, t, cond) for a batch of b source rows, their b edited rows, and any others.

    The others, such as the unconditional half of `guidance.cfg` in one batch, are left as they are.

    Raises:
      ValueError: fewer rows than pairs, or other numbers of tokens than the exchange is for.
    """
    b = exchange.align.shape[0]

    def exchanged(x, t, cond, *rest, **named):
        if len(x) < 2 * b:
            raise ValueError(
                f"{len(x)} rows are no {b} pairs of source and edited prompts; give all sources, then all edited ones"
            )

        def hook(path, reads_tokens, space, mix, q, k, v, mask):
            out = mix(q, k, v, mask)
            if not reads_tokens and np.prod(space) > exchange.self_size:
                return out
            until = exchange.cross_until if reads_tokens else exchange.self_until
            source, edited = (
                attend.probabilities(q[rows], k[rows], None if mask is None else mask[rows])
                for rows in (slice(b), slice(b, 2 * b))
            )
            found = exchanged_maps(exchange, source, edited) if reads_tokens else source
            maps = jnp.where((t[b : 2 * b] >= until)[:, None, None, None], found, edited)
            values = jnp.einsum("bhnm,bmhd->bnhd", maps.astype(v.dtype), v[b : 2 * b])
            return out.at[b : 2 * b].set(values)

        return taps.attended(network, hook)(x, t, cond, *rest, **named)

    return exchanged


def exchanged_maps(
    exchange: Exchange, source: Float[Array, "b h q m"], edited: Float[Array, "b h q n"]
) -> Float[Array, "b h q n"]:
    """The maps of words that the edited rows use.

    Raises:
      ValueError: other numbers of tokens than the exchange is for.
    """
    if (source.shape[-1], edited.shape[-1]) != exchange.align.shape[1:]:
        raise ValueError(
            f"maps of {source.shape[-1]} and {edited.shape[-1]} tokens do not fit an exchange for "
            f"{exchange.align.shape[1:]}; make both from the same rows of tokens"
        )
    carried = jnp.einsum("bhqm,bmn->bhqn", source, exchange.align)
    share, weigh = (a[:, None, None] for a in (exchange.share, exchange.weigh))
    return (share * carried + (1 - share) * edited) * weigh


def positions(row: Sequence[int], word: Sequence[int]) -> Bool[np.ndarray, " n"]:
    """Where in a row of token ids the ids of a word stand, wherever they do.

    Raises:
      ValueError: they do not.
    """
    found, n = np.zeros(len(row), bool), len(word)
    for i in range(len(row) - n + 1):
        if n and list(row[i : i + n]) == list(word):
            found[i : i + n] = True
    if not found.any():
        raise ValueError(
            f"the tokens {list(word)} are not among those of the prompt; weigh words of the edited prompt"
        )
    return found
