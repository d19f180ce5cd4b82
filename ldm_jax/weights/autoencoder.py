"""The KL autoencoders under diffusers' names, `AutoencoderKL`: Stable Diffusion 1, 2, XL, the x4 upscaler, the paper's.

    model = from_config(config, jnp.bfloat16)
    tensors = files.read(path)
    params = table.load(autoencoder.table(tensors), shapes, tensors)

A config also says what the latents are multiplied by: `scaling_factor(config)` is the scale of `codec.autoencoder`.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from ldm_jax.models import autoencoder
from ldm_jax.nn import conv
from ldm_jax.weights import blocks, configs
from ldm_jax.weights.table import Row, Table, under

SCALE = 0.18215  # of Stable Diffusion 1 and 2, whose configs do not tell it
SIDES = (("down", "DownEncoderBlock2D"), ("up", "UpDecoderBlock2D"))
TAKES = dict(
    in_channels=3,
    out_channels=3,
    down_block_types=("DownEncoderBlock2D",),
    up_block_types=("UpDecoderBlock2D",),
    block_out_channels=(64,),
    layers_per_block=1,
    norm_num_groups=32,
    mid_block_add_attention=True,
)
ONLY = dict(act_fn=("silu", "swish"))
IDLE = ("sample_size", "scaling_factor", "force_upcast")


def table(tensors: Mapping[str, Any] = {}) -> Table:
    """`models.autoencoder.KLAutoencoder`; with the tensors of a file, as that file names the attention."""
    attend = blocks.attention(tensors)
    return (
        *under("encoder", "encoder", blocks.levels(attend)),
        *under("decoder", "decoder", blocks.levels(attend)),
        Row("quant_conv", "quant_conv"),
        Row("post_quant_conv", "post_quant_conv"),
    )


def from_config(config: Mapping[str, Any], dtype: Any = jnp.float32) -> autoencoder.KLAutoencoder:
    """The network of an `AutoencoderKL`'s config, in `compute_dtype(config, dtype)`.

    Raises:
      ValueError: the config asks for what we lack.
    """
    own = dict(latent_channels=4, use_quant_conv=True, use_post_quant_conv=True)
    given = configs.read(config, "AutoencoderKL", TAKES | own, ONLY, IDLE)
    return autoencoder.KLAutoencoder(
        **settings(given, "AutoencoderKL"),
        z_channels=given["latent_channels"],
        embed=given["latent_channels"],
        use_quant_conv=given["use_quant_conv"],
        use_post_quant_conv=given["use_post_quant_conv"],
        dtype=compute_dtype(config, dtype),
    )


def to_config(
    model: autoencoder.KLAutoencoder, scaling_factor: float = SCALE, force_upcast: bool = True
) -> dict[str, Any]:
    """The inverse; what the network does not know is given, in diffusers' defaults. Dropout is not told.

    Raises:
      ValueError: a network that is no `AutoencoderKL`: other channels in z than in the latents, strides other than 2.
    """
    if model.embed != model.z_channels:
        raise ValueError(
            f"an AutoencoderKL has as many latent channels as the encoder gives; embed={model.embed} and "
            f"z_channels={model.z_channels} differ, so this network has no such config"
        )
    return (
        {"_class_name": "AutoencoderKL"}
        | config_of(model)
        | dict(
            latent_channels=model.embed,
            use_quant_conv=model.use_quant_conv,
            use_post_quant_conv=model.use_post_quant_conv,
            scaling_factor=scaling_factor,
            force_upcast=force_upcast,
        )
    )


def scaling_factor(config: Mapping[str, Any]) -> float:
    """What latents are multiplied by before the diffusion model sees them."""
    return float(config.get("scaling_factor", SCALE))


def compute_dtype(config: Mapping[str, Any], dtype: Any) -> Any:
    """`dtype`, but float32 for float16 where the config says `force_upcast`.

    The activations of XL's autoencoder leave the range of float16, and the image is black; bfloat16 has the range.
    """
    if config.get("force_upcast") and jnp.dtype(dtype) == jnp.float16:
        return jnp.float32
    return dtype


def settings(given: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The arguments that autoencoders of this shape share, from the values of `TAKES`; `what` names the config.

    Raises:
      ValueError: other channels out than in, or levels that we lack or that differ between encoder and decoder.
    """
    widths, levels = given["block_out_channels"], len(given["block_out_channels"])
    down, up = (
        [_attends(kind, plain, what) for kind in given[f"{side}_block_types"]]
        for side, plain in SIDES
    )
    if not levels == len(down) == len(up) or down != up[::-1]:
        raise ValueError(
            f"the config of this {what} has block_out_channels={widths}, "
            f"down_block_types={given['down_block_types']} and up_block_types={given['up_block_types']}; we have "
            "decoders that mirror their encoders only, so such a model cannot be loaded"
        )
    if given["in_channels"] != given["out_channels"]:
        raise ValueError(
            f"the config of this {what} has in_channels={given['in_channels']} and "
            f"out_channels={given['out_channels']}; we have equal ones only, so such a model cannot be loaded"
        )
    width = math.gcd(*widths)
    return dict(
        width=width,
        mults=tuple(w // width for w in widths),
        blocks=given["layers_per_block"],
        attention=tuple(down) if any(down) else (),
        middle_attention=given["mid_block_add_attention"],
        channels=given["in_channels"],
        groups=given["norm_num_groups"],
    )


def _attends(kind: str, plain: str, what: str) -> bool:
    if kind not in (plain, f"Attn{plain}"):
        raise ValueError(
            f"the config of this {what} has a block {kind!r}; we have {plain!r} and 'Attn{plain}', "
            "so such a model cannot be loaded"
        )
    return kind != plain


def config_of(model: Any) -> dict[str, Any]:
    """The inverse of `settings`.

    Raises:
      ValueError: a stride other than 2.
    """
    if set(conv.per_axis(model.stride, 2)) != {2}:
        raise ValueError(
            f"diffusers has autoencoders of images with stride 2 only, and this one has stride={model.stride}"
        )
    attends = tuple(model.attention) or (False,) * len(model.mults)
    down, up = (
        [f"Attn{plain}" if attends else plain for attends in order]
        for (_, plain), order in zip(SIDES, (attends, attends[::-1]), strict=True)
    )
    return dict(
        in_channels=model.channels,
        out_channels=model.channels,
        down_block_types=down,
        up_block_types=up,
        block_out_channels=[model.width * m for m in model.mults],
        layers_per_block=model.blocks,
        norm_num_groups=model.groups,
        mid_block_add_attention=model.middle_attention,
        act_fn="silu",
    )
