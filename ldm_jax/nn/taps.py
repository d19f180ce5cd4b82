"""Looking into a network's attention, and changing it, from outside: by interceptors, so that no module has a flag.

Networks here are functions that apply Linen modules. What comes back is a function too, of the same arguments, and it
is another function object, so that jit does not take it for the one it knows. Blocks are named by their path below the
network: "down_1/attn_0/block_0/self_attn", "mid/attn/block_0/cross_attn" (transformers), "mid/attn/attn" (plain),
"block_7/attn" (of a DiT).
"""

import contextvars
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from ldm_jax import tree
from ldm_jax.nn import attend, attention, modulated, once

Hook = Callable[..., Array]  # see `attended`
Maps = dict[str, Array]  # {path: [b h *space m]}, of layers of any size
# What attends between the positions of an array [b *space c], and so knows where they lie.
BLOCKS = (attention.SpatialTransformer, attention.AttentionBlock, modulated.Block)

_APART = contextvars.ContextVar("apart", default=False)


def apart(network: Callable[..., Any]) -> Callable[..., Any]:
    """A network that stays as it is while another one, which it helps, is looked into or changed: a ControlNet."""

    def left_alone(*args, **kwargs):
        token = _APART.set(True)
        try:
            return network(*args, **kwargs)
        finally:
            _APART.reset(token)

    return left_alone


def attended(network: Callable[..., Any], hook: Hook) -> Callable[..., Any]:
    """The network with `hook` in place of what every attention does with its queries, keys and values.

    `hook(path, reads_tokens, space, mix, q, k, v, mask)` returns values [b n h d]; `mix(q, k, v, mask)` is the
    attention itself. q is [b n h d], k and v are [b m h d], and `space` is the shape of the n positions.
    """

    def tapped(*args, **kwargs):
        spaces, reads = [], []  # of the blocks that are being called

        def intercept(call, given, named, context):
            module, method = context.module, context.method_name
            if _APART.get():
                return call(*given, **named)
            if isinstance(module, attention.Attention) and method == "mix":
                space = spaces[-1] if spaces else given[0].shape[1:2]
                return hook("/".join(module.path), reads[-1], space, call, *given, **named)
            if method != "__call__":
                return call(*given, **named)
            if isinstance(module, BLOCKS):
                return _within(spaces, given[0].shape[1:-1], call, given, named)
            if isinstance(module, attention.Attention):
                tokens = given[1] if len(given) > 1 else named.get("tokens")
                return _within(reads, tokens is not None, call, given, named)
            return call(*given, **named)

        with once.every(), nn.intercept_methods(intercept):
            return network(*args, **kwargs)

    return tapped


def _within(stack, value, call, given, named):
    stack.append(value)
    try:
        return call(*given, **named)
    finally:
        stack.pop()


def _chosen(blocks: Sequence[str], path: str) -> bool:
    return any(re.match(rf"(?:{block})(?:/|$)", path) for block in blocks)


def with_identity(network: Callable[..., Any], blocks: Sequence[str]) -> Callable[..., Any]:
    """Every position attends to itself alone in the self-attention of these blocks (Ahn et al. 2024, PAG).

    A block is a regex for the beginning of a path up to a slash: "mid", "up_0", "down_1/attn_.". With no block it is
    the network itself.

    Raises:
      ValueError: a block that has no self-attention.
    """
    if not blocks:
        return network

    def perturbed(*args, **kwargs):
        seen = set()

        def hook(path, reads_tokens, space, mix, q, k, v, mask):
            if reads_tokens:
                return mix(q, k, v, mask)
            seen.add(path)
            return v if _chosen(blocks, path) else mix(q, k, v, mask)

        out = attended(network, hook)(*args, **kwargs)
        _found(blocks, seen)
        return out

    return perturbed


def _found(blocks, paths):
    for block in blocks:
        if not any(_chosen([block], path) for path in paths):
            raise ValueError(
                f"no self-attention lies in the block {block!r} of this network, which has {sorted(paths)}; "
                "name other blocks (of a sampler: sampler.guidance.blocks)"
            )


def check_blocks(params: Any, blocks: Sequence[str]) -> None:
    """`with_identity`'s look at its blocks, by the names of a network's parameters: nothing is traced.

    Raises:
      ValueError: a block that has no self-attention.
    """
    ends = re.compile(r"(.*(?<!cross_attn))/q/kernel")
    _found(blocks, {found[1] for name in tree.names(params) if (found := ends.fullmatch(name))})


def with_maps(
    network: Callable[..., Any], of_tokens: bool, blocks: Sequence[str] = (".*",)
) -> Callable[..., tuple[Any, Maps]]:
    """`(what the network gives, {path: what each position takes of each key})`.

    Of attention to tokens, [b h *space m] for m tokens, or else of attention between positions, in the same layout for
    m positions in a row. Over the keys the values sum to one.

    Raises:
      ValueError: there is none in these blocks.
    """

    def tapped(*args, **kwargs):
        maps = {}

        def hook(path, reads_tokens, space, mix, q, k, v, mask):
            if reads_tokens == of_tokens and _chosen(blocks, path):
                weights = attend.probabilities(q, k, mask)
                maps[path] = weights.reshape(*weights.shape[:2], *space, -1)
            return mix(q, k, v, mask)

        out = attended(network, hook)(*args, **kwargs)
        if not maps:
            kind = "cross-attention, which reads tokens" if of_tokens else "self-attention"
            raise ValueError(f"this network has no {kind}, in the blocks {list(blocks)}")
        return out, maps

    return tapped


def heat(maps: Maps, space: Sequence[int]) -> Float[Array, "b *space m"]:
    """How much each position takes of each token: the mean over heads and layers, all brought to one size, linearly.

    Tang et al. 2023 (DAAM) sum where this averages, so that the values at a position sum to one over the tokens.
    They enlarge by bicubic interpolation, which leaves [0, 1].
    """

    def grown(weights):
        mean = weights.mean(1)
        return jax.image.resize(mean, (len(mean), *space, mean.shape[-1]), "linear")

    return jnp.stack([grown(weights) for weights in maps.values()]).mean(0)


def received(weights: Float[Array, "b h *space m"]) -> Float[Array, "b *space"]:
    """How much each position is attended to by all others, the mean over heads: 1 on average (Hong et al. 2023)."""
    b, _, *space, m = weights.shape
    return weights.mean(1).reshape(b, -1, m).sum(1).reshape(b, *space)
