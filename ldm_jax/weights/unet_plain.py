"""`UNet2DModel` of diffusers: U-Nets with plain attention, of the unconditional latent diffusion models."""

from collections.abc import Mapping, Sequence
from typing import Any

from ldm_jax.models import unet
from ldm_jax.weights import configs
from ldm_jax.weights import unet_sections as sections


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a `UNet2DModel`."""
    takes = sections.COMMON | dict(
        block_out_channels=(224, 448, 672, 896),
        down_block_types=("DownBlock2D", *("AttnDownBlock2D",) * 3),
        attn_norm_num_groups=None,
        add_attention=True,
        downsample_type="conv",
        upsample_type="conv",
    )
    kinds = ("conv", "resnet")
    only = sections.ONLY | dict(
        mid_block_type=("UNetMidBlock2D",),
        class_embed_type=(None,),
        downsample_type=kinds,
        upsample_type=kinds,
    )
    c = configs.read(config, "U-Net", takes, only, (*sections.IDLE, "up_block_types"))
    attends = sections.attends(c["down_block_types"], "AttnDownBlock2D")
    kind = c["downsample_type"]
    if kind != c["upsample_type"] or (kind == "resnet" and not all(attends)):
        raise ValueError(
            f"downsample_type={kind!r} with upsample_type={c['upsample_type']!r} and "
            f"down_block_types={c['down_block_types']} changes the resolution in two ways; we cannot load it"
        )
    scale_shift = c["resnet_time_scale_shift"] == "scale_shift"
    groups = c["attn_norm_num_groups"]
    if c["add_attention"] and groups != c["norm_num_groups"] and (groups or scale_shift):
        raise ValueError(
            f"attn_norm_num_groups={groups} means another norm in the middle than norm_num_groups="
            f"{c['norm_num_groups']} (None with scale_shift: no norm); such a U-Net cannot be loaded"
        )
    head_dim = c["attention_head_dim"]
    return sections.common(c, "U-Net") | dict(
        attention=tuple(map(int, attends)),
        middle=int(c["add_attention"]),
        transformer=False,
        resample_blocks=kind == "resnet",
        **(dict(heads=1) if head_dim is None else dict(head_dim=head_dim)),
        **sections.vector(c),
    )


def to_config(network: unet.UNet, depths: Sequence[int]) -> dict[str, Any]:
    """The part of the config that is not `unet_sections.to_common`."""
    wide = [network.width * m for m in network.mults]
    levels = [i for i, d in enumerate(depths) if d] + [len(wide) - 1] * bool(network.middle)
    dims = {wide[i] // network._heads(i) for i in levels}
    single = levels and all(network._heads(i) == 1 for i in levels)
    if len(dims) > 1 and not single:
        raise ValueError(
            f"diffusers' U-Nets with plain attention have heads of one width, and here they have {sorted(dims)}; "
            "use `head_dim`"
        )
    if network.resample_blocks and not all(depths):
        raise ValueError(
            f"diffusers' U-Nets with resample_blocks attend at all levels; attention={depths}"
        )
    if network.vector and network.vector_from == "mlp":
        raise ValueError("diffusers' U-Nets with plain attention read no vector but a class")
    down = ["AttnDownBlock2D" if d else "DownBlock2D" for d in depths]
    kind = "resnet" if network.resample_blocks else "conv"
    return dict(
        _class_name="UNet2DModel",
        down_block_types=down,
        up_block_types=[name.replace("Down", "Up") for name in reversed(down)],
        attention_head_dim=None if single or not dims else dims.pop(),
        attn_norm_num_groups=network.groups,
        add_attention=bool(network.middle),
        downsample_type=kind,
        upsample_type=kind,
        num_class_embeds=network.vector or None,
    )
