"""Configs in diffusers' words of the networks that original checkpoints hold, from their numbers.

What `recognise`, which counts and measures tensors, and `original_yaml`, which reads settings, have in common: so the
`from_config` of each network builds it from either. Where diffusers has no words for a model, a ValueError says so.
"""

from collections.abc import Sequence
from typing import Any

HEAD = 64  # the width of a head in all of CLIP's text towers
TIME_EMBED = 256  # of each number among the sizes that Stable Diffusion XL is told


def unet(
    *,
    channels: tuple[int, int],
    widths: Sequence[int],
    blocks: int,
    depths: Sequence[int],
    middle: int = 1,
    context: int | None = None,
    heads: int | Sequence[int] | None = None,
    head_dim: int | None = None,
    linear: bool = False,
    only_cross: Sequence[bool] = (),
    vector: int = 0,
    sizes: bool = False,
    classes: int = 0,
    scale_shift: bool = False,
    resample_blocks: bool = False,
) -> dict[str, Any]:
    """`UNet2DConditionModel`, or `UNet2DModel` without a context.

    `depths` of attention (0: none), `heads` and `only_cross` are for each level; `context` is the width of the tokens;
    `vector` is the width of the vector, in which `sizes` says that there are a text's embedding and sizes.

    Raises:
      ValueError: neither heads nor head_dim, or what these classes lack.
    """
    if context is None:
        return _plain_unet(
            channels, widths, blocks, depths, middle, head_dim, scale_shift, resample_blocks
        )
    if heads is None and head_dim is None:
        raise ValueError(
            "the shapes of a U-Net do not tell how many heads it has; give attention_head_dim (diffusers' name for the "
            "number of heads) or the model's YAML file as config"
        )
    depth = {d for d in depths if d}
    if not middle or resample_blocks or (depths[-1] and depths[-1] != middle):
        raise ValueError(
            f"a U-Net of depths {tuple(depths)}, {middle} in the middle and resample_blocks={resample_blocks} has no "
            "config of UNet2DConditionModel; build models.unet.UNet by hand"
        )
    kinds = ["CrossAttn" if d else "" for d in depths]
    per_level = [d or 1 for d in (*depths[:-1], middle)]
    config = {
        "_class_name": "UNet2DConditionModel",
        "in_channels": channels[0],
        "out_channels": channels[1],
        "block_out_channels": tuple(widths),
        "layers_per_block": blocks,
        "down_block_types": tuple(f"{kind}DownBlock2D" for kind in kinds),
        "up_block_types": tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        "cross_attention_dim": context,
        "attention_head_dim": heads if heads else tuple(width // head_dim for width in widths),
        "use_linear_projection": linear,
        "transformer_layers_per_block": middle if depth | {middle} == {middle} else per_level,
        "norm_num_groups": 32,
    }
    if any(only_cross):
        config["only_cross_attention"] = tuple(only_cross)
    if scale_shift:
        config["resnet_time_scale_shift"] = "scale_shift"
    if vector and sizes:
        config |= {"addition_embed_type": "text_time", "addition_time_embed_dim": TIME_EMBED}
    elif vector:
        config["class_embed_type"] = "projection"
    if vector:
        config["projection_class_embeddings_input_dim"] = vector
    if classes:
        config["num_class_embeds"] = classes
    return config


def _plain_unet(channels, widths, blocks, depths, middle, head_dim, scale_shift, resample_blocks):
    if head_dim is None:
        raise ValueError(
            "a U-Net without cross-attention needs the width of its heads, which shapes do not tell and which must be "
            "the same at all levels; give attention_head_dim or the model's YAML file as config"
        )
    kinds = ["Attn" if d else "" for d in depths]
    kind = "resnet" if resample_blocks else "conv"
    return {
        "_class_name": "UNet2DModel",
        "in_channels": channels[0],
        "out_channels": channels[1],
        "block_out_channels": tuple(widths),
        "layers_per_block": blocks,
        "down_block_types": tuple(f"{kind}DownBlock2D" for kind in kinds),
        "up_block_types": tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        "attention_head_dim": head_dim,
        "add_attention": bool(middle),
        "resnet_time_scale_shift": "scale_shift" if scale_shift else "default",
        "downsample_type": kind,
        "upsample_type": kind,
        "norm_num_groups": 32,
    }


def autoencoder(
    *,
    channels: tuple[int, int],
    widths: Sequence[int],
    blocks: int,
    z_channels: int,
    embed: int,
    attends: Sequence[bool] = (),
    codes: int = 0,
    scale: float | None = None,
) -> dict[str, Any]:
    """`AutoencoderKL`, or `VQModel` with `codes`; `scale` is what latents are multiplied by (None: not known).

    Raises:
      ValueError: latents of another width than the encoder's, which `AutoencoderKL` lacks.
    """
    if not codes and embed != z_channels:
        raise ValueError(
            f"an autoencoder with {z_channels} channels after the encoder and {embed} in its latents has no config of "
            "AutoencoderKL; build models.autoencoder.KLAutoencoder by hand"
        )
    kinds = ["Attn" if a else "" for a in attends or (False,) * len(widths)]
    config = {
        "_class_name": "VQModel" if codes else "AutoencoderKL",
        "in_channels": channels[0],
        "out_channels": channels[1],
        "block_out_channels": tuple(widths),
        "layers_per_block": blocks,
        "down_block_types": tuple(f"{kind}DownEncoderBlock2D" for kind in kinds),
        "up_block_types": tuple(f"{kind}UpDecoderBlock2D" for kind in reversed(kinds)),
        "latent_channels": z_channels,
        "norm_num_groups": 32,
    }
    if codes:
        config |= {"num_vq_embeddings": codes, "vq_embed_dim": embed}
    return config if scale is None else config | {"scaling_factor": scale}


def clip_text(
    *,
    width: int,
    layers: int,
    projection: int,
    act: str = "gelu",
    vocab: int = 49408,
    length: int = 77,
    inner: int | None = None,
    projects: bool = False,
) -> dict[str, Any]:
    """transformers' `CLIPTextModel`, or `CLIPTextModelWithProjection` if it `projects`."""
    return {
        "architectures": ["CLIPTextModelWithProjection" if projects else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": inner or 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // HEAD,
        "max_position_embeddings": length,
        "hidden_act": act,
        "projection_dim": projection,
    }


def bert_text(
    *, width: int, layers: int, vocab: int = 30522, length: int = 77, heads: int = 8
) -> dict[str, Any]:
    """diffusers' `LDMBertModel`, whose heads are 64 wide whatever the width of the model."""
    return {
        "_class_name": "LDMBertModel",
        "vocab_size": vocab,
        "d_model": width,
        "encoder_layers": layers,
        "encoder_attention_heads": heads,
        "encoder_ffn_dim": 4 * width,
        "head_dim": 64,
        "max_position_embeddings": length,
    }


def scheduler(
    start: float = 0.00085,
    end: float = 0.012,
    prediction: str = "epsilon",
    steps: int = 1000,
    zero_snr: bool = False,
) -> dict[str, Any]:
    """The noise of training; what CompVis calls linear is linear in √β."""
    config = {
        "_class_name": "DDIMScheduler",
        "beta_schedule": "scaled_linear",
        "beta_start": start,
        "beta_end": end,
        "num_train_timesteps": steps,
        "prediction_type": prediction,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
    return config | {"rescale_betas_zero_snr": True} if zero_snr else config
