"""The YAML files with the settings of CompVis' and Stability's models, as configs in diffusers' words.

They name classes of those repositories, of which we know what they are built of; no class is imported. Settings that
are unknown here raise, as everywhere (`configs.read`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ldm_jax.weights import configs, original_configs

# CLIP's text towers that YAML files name.
CLIP_L = dict(width=768, layers=12, projection=768, act="quick_gelu")
OPEN_CLIP = {
    "ViT-H-14": dict(width=1024, layers=24, projection=1024),
    "ViT-bigG-14": dict(width=1280, layers=32, projection=1280),
}

# Of what has a table of noise of its own.
SECOND = {"low_scale_config": "low_res_scheduler", "noise_aug_config": "image_noising_scheduler"}
SCHEDULES = {  # as their code names them; by "linear" it means linear in the root
    "linear": "scaled_linear",
    "sqrt_linear": "linear",
    "cosine": "squaredcos_cap_v2",
    "squaredcos_cap_v2": "squaredcos_cap_v2",
}


def from_yaml(path: str | Path) -> dict[str, dict[str, Any]]:
    """The configs of the components that a YAML file of CompVis' or Stability's repositories describes.

    Keys: unet, vae, scheduler, text_encoder, text_encoder_2, low_res_scheduler, image_noising_scheduler; as many as
    there are.

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
        found |= {
            name: _second_noise(params[key].get("params", {}))
            for key, name in SECOND.items()
            if key in params
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
    return original_configs.unet(
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
    return original_configs.autoencoder(
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
        return original_configs.scheduler(prediction=kinds[scaling])
    kinds = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
    return original_configs.scheduler(
        params.get("linear_start", 1e-4),
        params.get("linear_end", 2e-2),
        kinds[params.get("parameterization", "eps")],
        params.get("timesteps", 1000),
    )


def _second_noise(params: Mapping[str, Any]) -> dict[str, Any]:
    given = params.get("noise_schedule_config") or {}
    schedule = given.get("beta_schedule", "linear")
    if schedule not in SCHEDULES:
        raise ValueError(f"the schedule {schedule!r} is unknown; we have {sorted(SCHEDULES)}")
    return {
        "beta_schedule": SCHEDULES[schedule],
        "beta_start": given.get("linear_start", 1e-4),
        "beta_end": given.get("linear_end", 2e-2),
        "num_train_timesteps": given.get("timesteps", 1000),
    }


def _text_of(condition: Any) -> dict[str, Any] | None:
    """The config of a text encoder; None for what is no text encoder (classes, sizes, nothing)."""
    if not isinstance(condition, Mapping):
        return None
    kind, settings = condition["target"].split(".")[-1], condition.get("params") or {}
    if kind == "FrozenCLIPEmbedder":
        version = settings.get("version", "openai/clip-vit-large-patch14")
        if version != "openai/clip-vit-large-patch14":
            raise ValueError(f"the text encoder {version!r} is unknown; give its own config.json")
        return original_configs.clip_text(**CLIP_L)
    if kind in ("FrozenOpenCLIPEmbedder", "FrozenOpenCLIPEmbedder2"):
        arch = settings.get("arch", "ViT-H-14")
        if arch not in OPEN_CLIP:
            raise ValueError(f"the text encoder {arch!r} is unknown; we have {sorted(OPEN_CLIP)}")
        if kind.endswith("2"):
            return original_configs.clip_text(**OPEN_CLIP[arch], projects=True)
        last = settings.get("layer", "last") == "penultimate"
        return original_configs.clip_text(
            **OPEN_CLIP[arch] | {"layers": OPEN_CLIP[arch]["layers"] - last}
        )
    if kind == "BERTEmbedder":
        return original_configs.bert_text(
            width=settings["n_embed"],
            layers=settings["n_layer"],
            vocab=settings.get("vocab_size", 30522),
            length=settings.get("max_seq_len", 77),
        )
    return None
