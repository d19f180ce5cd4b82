"""What the configs of diffusers' U-Nets and ControlNets have in common, and how it is read."""

from collections.abc import Mapping, Sequence
from typing import Any

from ldm_jax.models import unet

# With the defaults of all but UNet2DModel.
COMMON = dict(
    block_out_channels=(320, 640, 1280, 1280),
    down_block_types=(*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    layers_per_block=2,
    attention_head_dim=8,
    norm_num_groups=32,
    norm_eps=1e-5,
    resnet_time_scale_shift="default",
    dropout=0.0,
    class_embed_type=None,
    num_class_embeds=None,
)
ONLY = dict(
    act_fn=("silu", "swish"),
    flip_sin_to_cos=(True,),
    freq_shift=(0,),
    downsample_padding=(1,),
    mid_block_scale_factor=(1,),
    resnet_time_scale_shift=("default", "scale_shift"),
    time_embedding_type=("positional",),
)
IDLE = (
    "sample_size",
    "in_channels",
    "out_channels",
    "upcast_attention",
    "addition_embed_type_num_heads",
    "num_train_timesteps",
)


def common(c: Mapping[str, Any], what: str) -> dict[str, Any]:
    widths = c["block_out_channels"]
    if any(w % widths[0] for w in widths) or len(widths) != len(c["down_block_types"]):
        raise ValueError(
            f"block_out_channels={widths} must be multiples of the first, one for each of "
            f"down_block_types={c['down_block_types']}; such a {what} cannot be loaded"
        )
    return dict(
        width=widths[0],
        mults=tuple(w // widths[0] for w in widths),
        blocks=equal(c, "layers_per_block"),
        groups=c["norm_num_groups"],
        eps=c["norm_eps"],
        scale_shift=c["resnet_time_scale_shift"] == "scale_shift",
        dropout=c["dropout"],
    )


def equal(c: Mapping[str, Any], key: str) -> int:
    """The number that all levels have in common."""
    values = c[key] if isinstance(c[key], tuple) else (c[key],)
    if len(set(values)) != 1:
        raise ValueError(f"{key}={values} must be the same for all levels of our U-Net")
    return values[0]


def attends(types: Sequence[str], attending: str) -> tuple[bool, ...]:
    if wrong := set(types) - {attending, "DownBlock2D"}:
        raise ValueError(
            f"down_block_types has {sorted(wrong)}; we have {attending} and DownBlock2D, "
            "and such a model cannot be loaded"
        )
    return tuple(t == attending for t in types)


def vector(c: Mapping[str, Any]) -> dict[str, Any]:
    """Whose vector the network reads."""
    rows, projected = c["num_class_embeds"], c.get("projection_class_embeddings_input_dim")
    kinds = [c["class_embed_type"], c.get("addition_embed_type"), rows]
    if sum(kind is not None for kind in kinds) > 1:
        raise ValueError(
            f"class_embed_type={kinds[0]!r}, addition_embed_type={kinds[1]!r} and num_class_embeds={rows} are "
            "several vectors, and our U-Net reads one; such a model cannot be loaded"
        )
    if rows is not None:
        return dict(vector=rows, vector_from="table")
    if not any(kinds):
        return {}
    if projected is None:
        raise ValueError(
            f"class_embed_type={kinds[0]!r}, addition_embed_type={kinds[1]!r} needs a "
            "projection_class_embeddings_input_dim, the width of the vector; add it to the config"
        )
    return dict(vector=projected)


def to_common(network: unet.UNet, params: Any) -> dict[str, Any]:
    """The part of a config that all of them have.

    Raises:
      ValueError: a network that diffusers has not.
    """
    if network.coordinates or network.stride != 2 or params["conv_in"]["kernel"].ndim != 4:
        raise ValueError(
            f"diffusers has no U-Net with coordinates={network.coordinates}, stride={network.stride}, "
            f"{params['conv_in']['kernel'].ndim - 2} spatial axes; it has False, 2 and 2"
        )
    return dict(
        in_channels=params["conv_in"]["kernel"].shape[-2],
        block_out_channels=[network.width * m for m in network.mults],
        layers_per_block=network.blocks,
        norm_num_groups=network.groups,
        norm_eps=network.eps,
        resnet_time_scale_shift="scale_shift" if network.scale_shift else "default",
        act_fn="silu",
        dropout=network.dropout,
        flip_sin_to_cos=True,
        freq_shift=0,
    )
