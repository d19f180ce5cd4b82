"""Reduced folders of Stable Diffusion and XL, written by our own modules: no reference is needed to read them."""

import json

import jax.numpy as jnp

from ldm_jax.pretrained import components
from ldm_jax.weights import files
from tests import clip_files
from tests.drawn import like

VOCAB = 2 * 256 + 120 + 2  # of clip_files
UNET = dict(
    _class_name="UNet2DConditionModel",
    sample_size=8,
    in_channels=4,
    out_channels=4,
    block_out_channels=[16, 32],
    layers_per_block=1,
    down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
    up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
    attention_head_dim=2,
    cross_attention_dim=32,
    norm_num_groups=8,
)
VAE = dict(
    _class_name="AutoencoderKL",
    block_out_channels=[8, 16],
    down_block_types=["DownEncoderBlock2D"] * 2,
    up_block_types=["UpDecoderBlock2D"] * 2,
    norm_num_groups=4,
    latent_channels=4,
    sample_size=16,
)
TEXT = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    projection_dim=20,
    eos_token_id=2,
)
SCHEDULER = dict(
    _class_name="DDIMScheduler",
    beta_schedule="scaled_linear",
    beta_start=0.00085,
    beta_end=0.012,
    set_alpha_to_one=False,
    clip_sample=False,
    steps_offset=1,
)
XL = dict(
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=20 + 6 * 256,
    cross_attention_dim=64,
    use_linear_projection=True,
)
CONTROL = {
    key: UNET[key]
    for key in (
        "block_out_channels",
        "layers_per_block",
        "down_block_types",
        "attention_head_dim",
        "cross_attention_dim",
        "norm_num_groups",
    )
}
CONTROL["conditioning_embedding_out_channels"] = [8, 16]


def put(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


def component(folder, kind, config, seed=0):
    """A component's folder."""
    made = components.make(kind, config, jnp.float32)
    files.write(folder / f"{made.stem}.safetensors", made.export(like(made.shapes, seed)))
    put(folder / "config.json", config)


def write(folder, *, xl=False, low_res=None, **unet):
    """`unet`: settings that differ from those above; `low_res`: the config of the upscaler's second scheduler."""
    unet = UNET | (XL if xl else {}) | unet
    parts = dict(
        vae=["diffusers", "AutoencoderKL"],
        unet=["diffusers", "UNet2DConditionModel"],
        scheduler=["diffusers", "DDIMScheduler"],
    )
    component(folder / "unet", "UNet2DConditionModel", unet, 1)
    component(folder / "vae", "AutoencoderKL", VAE, 2)
    put(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    texts = {"text_encoder": "CLIPTextModel"}
    if xl:
        texts["text_encoder_2"] = "CLIPTextModelWithProjection"
    for seed, (name, kind) in enumerate(texts.items(), 3):
        tokenizer = name.replace("text_encoder", "tokenizer")
        component(folder / name, kind, TEXT, seed)
        clip_files.write(folder / tokenizer, pad="!" if seed > 3 else clip_files.END)
        parts |= {name: ["transformers", kind], tokenizer: ["transformers", "CLIPTokenizer"]}
    if low_res:
        put(folder / "low_res_scheduler" / "scheduler_config.json", low_res)
        parts["low_res_scheduler"] = ["diffusers", low_res["_class_name"]]
    kind = "StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline"
    put(folder / "model_index.json", {"_class_name": kind} | parts)
    return folder
