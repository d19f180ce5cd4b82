"""Configs in diffusers' words of networks that original checkpoints hold, from their numbers or from their YAML file.

The builders here are what `recognise`, which counts and measures tensors, and `from_yaml`, which reads the settings of
CompVis' and Stability's repositories, have in common: so the `from_config` of each network builds it from either.
Where diffusers has no words for a model, a ValueError says so.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ldm_jax.weights import configs

# Width, layers, heads and width of the projection of CLIP's text towers that YAML files name.
CLIP_L = dict(width=768, layers=12, projection=768, act="quick_gelu")
OPEN_CLIP = {
    "ViT-H-14": dict(width=1024, layers=24, projection=1024),
    "ViT-bigG-14": dict(width=1280, layers=32, projection=1280),
}
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


def from_yaml(path: str | Path) -> dict[str, dict[str, Any]]:
    """The configs of the components that a YAML file of CompVis' or Stability's repositories describes.

    Keys: unet, vae, scheduler, text_encoder, text_encoder_2; as many as there are.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: no such file of theirs, or settings that we lack.
    """
    try:
        content = yaml.safe_load(Path(path).read_text())
        params = content["model"]["params"]
        network = params.get("unet_config") or params.get("network_config")
        network, first = network["params"], params["first_stage_config"]
        conditioner = params.get("conditioner_config", {}).get("params", {}).get("emb_models")
        conditions = conditioner or [params.get("cond_stage_config", "")]
        found = {
            "unet": _unet_of(network, sizes=bool(conditioner)),
            "vae": _autoencoder_of(first, params),
            "scheduler": _scheduler_of(params),
        }
        texts = [text for condition in conditions if (text := _text_of(condition))]
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no YAML file of CompVis' or Stability's models ({type(error).__name__}: {error}); it should "
            "have model.params with unet_config and first_stage_config"
        ) from error
    found |= dict(zip(("text_encoder", "text_encoder_2"), texts, strict=False))
    # The text encoder with a projection is the second one, also where it is alone (the refiner's).
    if len(texts) == 1 and texts[0].get("architectures") == ["CLIPTextModelWithProjection"]:
        found["text_encoder_2"] = found.pop("text_encoder")
    return {name: config for name, config in found.items() if config}


def _unet_of(params: Mapping[str, Any], sizes: bool) -> dict[str, Any]:
    required = ("in_channels", "out_channels", "model_channels", "num_res_blocks", "channel_mult")
    given = configs.read(
        params,
        "U-Net (of a YAML file)",
        {name: params[name] for name in required}
        | {
            "attention_resolutions": (),
            "num_heads": -1,
            "num_head_channels": -1,
            "use_spatial_transformer": False,
            "transformer_depth": 1,
            "transformer_depth_middle": None,
            "context_dim": None,
            "use_linear_in_transformer": False,
            "disable_self_attentions": None,
            "num_classes": None,
            "adm_in_channels": 0,
            "use_scale_shift_norm": False,
            "resblock_updown": False,
        },
        only={"dims": (2,), "conv_resample": (True,), "use_new_attention_order": (False,)},
        idle=(
            *("image_size", "legacy", "dropout", "use_checkpoint", "use_fp16", "use_bf16"),
            *("spatial_transformer_attn_type", "num_heads_upsample"),
        ),
    )
    mults, context = given["channel_mult"], given["context_dim"]
    levels = range(len(mults))
    depth = given["transformer_depth"]
    depth = depth if isinstance(depth, tuple) else (depth,) * len(mults)
    attends = [2**i in given["attention_resolutions"] for i in levels]
    middle = given["transformer_depth_middle"]
    transformer = given["use_spatial_transformer"]
    by_dim = given["num_head_channels"] != -1
    classes = given["num_classes"]
    blocks = given["num_res_blocks"]
    if isinstance(blocks, tuple):
        if len(set(blocks)) > 1:
            raise ValueError(f"num_res_blocks={blocks} differ by level, which no U-Net here has")
        blocks = blocks[0]
    return unet(
        channels=(given["in_channels"], given["out_channels"]),
        widths=[given["model_channels"] * m for m in mults],
        blocks=blocks,
        depths=[d * a if transformer else int(a) for d, a in zip(depth, attends, strict=True)],
        middle=(depth[-1] if middle is None else middle) if transformer else 1,
        context=(context[0] if isinstance(context, tuple) else context) if transformer else None,
        heads=None if by_dim else given["num_heads"],
        head_dim=given["num_head_channels"] if by_dim else None,
        linear=given["use_linear_in_transformer"],
        only_cross=given["disable_self_attentions"] or (),
        vector=given["adm_in_channels"] if classes == "sequential" else 0,
        sizes=sizes,
        classes=classes if isinstance(classes, int) else 0,
        scale_shift=given["use_scale_shift_norm"],
        resample_blocks=given["resblock_updown"],
    )


def _autoencoder_of(first: Any, params: Mapping[str, Any]) -> dict[str, Any] | None:
    if "IdentityFirstStage" in first["target"]:
        return None
    if params.get("scale_by_std") and "scale_factor" not in params:
        raise ValueError(
            "the scale of this model's latents was measured in training (scale_by_std) and is the tensor scale_factor "
            "of its checkpoint; write that number into the YAML file as model.params.scale_factor"
        )
    quantizes = "VQModel" in first["target"]
    settings = first["params"]
    required = ("in_channels", "out_ch", "ch", "ch_mult", "num_res_blocks", "z_channels")
    given = configs.read(
        settings["ddconfig"],
        "autoencoder (of a YAML file)",
        {name: settings["ddconfig"][name] for name in required}
        | {"attn_resolutions": (), "resolution": 256},
        only={"double_z": (not quantizes,), "attn_type": ("vanilla", "vanilla-xformers")},
        idle=("dropout",),
    )
    return autoencoder(
        channels=(given["in_channels"], given["out_ch"]),
        widths=[given["ch"] * m for m in given["ch_mult"]],
        blocks=given["num_res_blocks"],
        z_channels=given["z_channels"],
        embed=settings["embed_dim"],
        attends=[
            given["resolution"] // 2**i in given["attn_resolutions"]
            for i in range(len(given["ch_mult"]))
        ],
        codes=settings["n_embed"] if quantizes else 0,
        scale=params.get("scale_factor", 1.0),
    )


def _scheduler_of(params: Mapping[str, Any]) -> dict[str, Any]:
    if params.get("beta_schedule", "linear") != "linear":
        raise ValueError(f"the schedule {params['beta_schedule']!r} is unknown; we have 'linear'")
    if "denoiser_config" in params:
        scaling = params["denoiser_config"]["params"]["scaling_config"]["target"].split(".")[-1]
        kinds = {"EpsScaling": "epsilon", "VScaling": "v_prediction"}
        if scaling not in kinds:
            raise ValueError(f"the scaling {scaling!r} is unknown; we have {sorted(kinds)}")
        return scheduler(prediction=kinds[scaling])
    kinds = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
    return scheduler(
        params.get("linear_start", 1e-4),
        params.get("linear_end", 2e-2),
        kinds[params.get("parameterization", "eps")],
        params.get("timesteps", 1000),
    )


def _text_of(condition: Any) -> dict[str, Any] | None:
    """The config of a text encoder; None for what is no text encoder (classes, sizes, nothing)."""
    if not isinstance(condition, Mapping):
        return None
    kind, settings = condition["target"].split(".")[-1], condition.get("params") or {}
    if kind == "FrozenCLIPEmbedder":
        version = settings.get("version", "openai/clip-vit-large-patch14")
        if version != "openai/clip-vit-large-patch14":
            raise ValueError(f"the text encoder {version!r} is unknown; give its own config.json")
        return clip_text(**CLIP_L)
    if kind in ("FrozenOpenCLIPEmbedder", "FrozenOpenCLIPEmbedder2"):
        arch = settings.get("arch", "ViT-H-14")
        if arch not in OPEN_CLIP:
            raise ValueError(f"the text encoder {arch!r} is unknown; we have {sorted(OPEN_CLIP)}")
        if kind.endswith("2"):
            return clip_text(**OPEN_CLIP[arch], projects=True)
        last = settings.get("layer", "last") == "penultimate"
        return clip_text(**OPEN_CLIP[arch] | {"layers": OPEN_CLIP[arch]["layers"] - last})
    if kind == "BERTEmbedder":
        return bert_text(
            width=settings["n_embed"],
            layers=settings["n_layer"],
            vocab=settings.get("vocab_size", 30522),
            length=settings.get("max_seq_len", 77),
        )
    return None
