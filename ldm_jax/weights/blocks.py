"""What U-Nets and autoencoders are made of, under the names that diffusers gives to the same modules.

Their blocks are ours one to one, numbered alike.
"""

import re
from collections.abc import Mapping
from typing import Any

from ldm_jax.weights.table import Layout, Row, Table, under

RES = (
    Row("norm1", "norm1"),
    Row("conv1", "conv1"),
    Row("emb", "time_emb_proj"),
    Row("norm2", "norm2"),
    Row("conv2", "conv2"),
    Row("skip", "conv_shortcut"),
)
ATTENTION = (
    Row("norm", "group_norm"),
    Row("attn/out", "to_out.0"),
    Row("attn/{qkv}", "to_{qkv}"),
)
TRANSFORMER = (
    Row("norm", "norm"),
    Row("proj_in", "proj_in"),
    Row("proj_out", "proj_out"),
    *under(
        "block_{b}",
        "transformer_blocks.{b}",
        (
            Row("norm_self", "norm1"),
            Row("norm_cross", "norm2"),
            Row("norm_ff", "norm3"),
            Row("self_attn/out", "attn1.to_out.0"),
            Row("self_attn/{qkv}", "attn1.to_{qkv}"),
            Row("cross_attn/out", "attn2.to_out.0"),
            Row("cross_attn/{qkv}", "attn2.to_{qkv}"),
            Row("ff/in", "ff.net.0.proj"),
            Row("ff/out", "ff.net.2"),
        ),
    ),
)


def levels(attend: Table) -> tuple[Row, ...]:
    """What a U-Net and both halves of an autoencoder have in common."""
    return (
        Row("conv_in", "conv_in"),
        *(
            row
            for way in ("down", "up")
            for row in (
                *under(f"{way}_{{i}}/res_{{j}}", f"{way}_blocks.{{i}}.resnets.{{j}}", RES),
                *under(f"{way}_{{i}}/attn_{{j}}", f"{way}_blocks.{{i}}.attentions.{{j}}", attend),
                Row(f"{way}_{{i}}/{way}sample/conv", f"{way}_blocks.{{i}}.{way}samplers.0.conv"),
                *under(f"{way}_{{i}}/{way}sample", f"{way}_blocks.{{i}}.{way}samplers.0", RES),
            )
        ),
        *under("mid/res_{j}", "mid_block.resnets.{j}", RES),
        *under("mid/attn", "mid_block.attentions.0", attend),
        Row("norm_out", "conv_norm_out"),
        Row("conv_out", "conv_out"),
    )


# The first versions of diffusers gave the projections these names, and the files that they wrote keep them.
EARLIER = (
    Row("norm", "group_norm"),
    Row("attn/q", "query"),
    Row("attn/k", "key"),
    Row("attn/v", "value"),
    Row("attn/out", "proj_attn"),
)


def attention(tensors: Mapping[str, Any] = {}) -> Table:
    """`ATTENTION` as a file with these tensors has it, or as diffusers writes it now.

    Their names tell whether the projections have earlier names, their shapes whether they are stored as matrices or, as
    CompVis does, as 1x1 convolutions.
    """
    earlier = any(name.endswith(".proj_attn.weight") for name in tensors)
    rows = EARLIER if earlier else ATTENTION
    query = r"attentions\.\d+\.(query|to_q)\.weight$"
    ranks = {len(tensor.shape) for name, tensor in tensors.items() if re.search(query, name)}
    ones = max(ranks, default=2) - 2
    return tuple(
        row._replace(layout=Layout(ones=ones)) if row.ours.startswith("attn/") else row
        for row in rows
    )
