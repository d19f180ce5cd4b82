"""Weights of diffusers' networks under our names: the same modules one to one, so a name is only rewritten."""

import re

import jax
import jax.numpy as jnp
import numpy as np

ATTENTION = [
    (r"attn/([qkv])", r"to_\1"),
    (r"attn/out", r"to_out.0"),
    (r"(attn_\d+|attn)/norm", r"\1/group_norm"),
]
TRANSFORMER = [
    (r"block_(\d+)/", r"transformer_blocks.\1."),
    (r"norm_self", "norm1"),
    (r"norm_cross", "norm2"),
    (r"norm_ff", "norm3"),
    (r"self_attn/([qkv])", r"attn1.to_\1"),
    (r"self_attn/out", "attn1.to_out.0"),
    (r"cross_attn/([qkv])", r"attn2.to_\1"),
    (r"cross_attn/out", "attn2.to_out.0"),
    (r"ff/in", "ff.net.0.proj"),
    (r"ff/out", "ff.net.2"),
]
COMMON = [
    (r"time/in", "time_embedding.linear_1"),
    (r"time/out", "time_embedding.linear_2"),
    (r"vector/in", "class_embedding.linear_1"),
    (r"vector/out", "class_embedding.linear_2"),
    (r"norm_out", "conv_norm_out"),
    (r"(down|up)_(\d+)/", r"\1_blocks.\2."),
    (r"(down|up)sample/", r"\1samplers.0."),
    (r"mid/", "mid_block."),
    (r"res_(\d+)/", r"resnets.\1."),
    (r"attn_(\d+)/", r"attentions.\1."),
    (r"attn/", "attentions.0."),
    (r"/skip/", "/conv_shortcut/"),
    (r"\.skip/", ".conv_shortcut/"),
    (r"([./])emb/", r"\1time_emb_proj/"),
    (r"kernel|scale", "weight"),
    (r"/", "."),
]


def their_name(name: str, rules: list[tuple[str, str]]) -> str:
    for pattern, replacement in [*rules, *COMMON]:
        name = re.sub(pattern, replacement, name)
    return name


def randomised(network, seed=0):
    """Every weight drawn anew, so that no branch is silent and no norm the identity."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in network.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim > 1:
                p.copy_(noise / p[0].numel() ** 0.5)
            else:
                p.copy_(0.2 * noise + ("norm" in name and name.endswith("weight")))
    return network.eval()


def copied(network, shapes, rules):
    """The weights of `network` as our tree of `shapes`; each of its tensors is used exactly once."""
    theirs = {k: v.numpy() for k, v in network.state_dict().items()}

    def take(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        tensor = theirs.pop(their_name(name, rules))
        if tensor.ndim > 1:
            tensor = np.moveaxis(tensor, (0, 1), (-1, -2))
        assert tensor.shape == leaf.shape, name
        return jnp.asarray(tensor)

    params = jax.tree_util.tree_map_with_path(take, shapes)
    assert not theirs
    return params


def relative_error(ours, theirs) -> float:
    """Ours channels last, theirs channels first."""
    theirs = np.moveaxis(theirs.detach().numpy(), 1, -1)
    assert ours.shape == theirs.shape
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
