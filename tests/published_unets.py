"""The `unet/config.json` and `config.json` of published models, and their numbers of parameters.

The numbers are those of diffusers' own models (tests/parity/test_unet_weights.py counts them again).
"""

LEVELS = dict(
    down_block_types=[*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    up_block_types=["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
)
SD1 = dict(
    _class_name="UNet2DConditionModel",
    _diffusers_version="0.6.0",
    act_fn="silu",
    attention_head_dim=8,
    block_out_channels=[320, 640, 1280, 1280],
    center_input_sample=False,
    cross_attention_dim=768,
    downsample_padding=1,
    flip_sin_to_cos=True,
    freq_shift=0,
    in_channels=4,
    layers_per_block=2,
    mid_block_scale_factor=1,
    norm_eps=1e-05,
    norm_num_groups=32,
    out_channels=4,
    sample_size=64,
    **LEVELS,
)
SD2 = SD1 | dict(
    _diffusers_version="0.10.0.dev0",
    attention_head_dim=[5, 10, 20, 20],
    cross_attention_dim=1024,
    dual_cross_attention=False,
    only_cross_attention=False,
    use_linear_projection=True,
)
UNCLIP = SD2 | dict(
    class_embed_type="projection",
    class_embeddings_concat=False,
    conv_in_kernel=3,
    conv_out_kernel=3,
    mid_block_only_cross_attention=None,
    mid_block_type="UNetMidBlock2DCrossAttn",
    num_class_embeds=None,
    projection_class_embeddings_input_dim=2048,
    resnet_out_scale_factor=1.0,
    resnet_skip_time_act=False,
    resnet_time_scale_shift="default",
    sample_size=96,
    time_cond_proj_dim=None,
    time_embedding_act_fn=None,
    time_embedding_dim=None,
    time_embedding_type="positional",
    timestep_post_act=None,
    upcast_attention=True,
)
SDXL = UNCLIP | dict(
    _diffusers_version="0.19.0.dev0",
    addition_embed_type="text_time",
    addition_embed_type_num_heads=64,
    addition_time_embed_dim=256,
    attention_head_dim=[5, 10, 20],
    block_out_channels=[320, 640, 1280],
    class_embed_type=None,
    cross_attention_dim=2048,
    cross_attention_norm=None,
    down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    encoder_hid_dim=None,
    encoder_hid_dim_type=None,
    num_attention_heads=None,
    projection_class_embeddings_input_dim=2816,
    sample_size=128,
    transformer_layers_per_block=[1, 2, 10],
    up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    upcast_attention=None,
)
REFINER = SDXL | dict(
    attention_head_dim=[6, 12, 24, 24],
    block_out_channels=[384, 768, 1536, 1536],
    cross_attention_dim=1280,
    down_block_types=["DownBlock2D", *["CrossAttnDownBlock2D"] * 2, "DownBlock2D"],
    projection_class_embeddings_input_dim=2560,
    transformer_layers_per_block=4,
    up_block_types=["UpBlock2D", *["CrossAttnUpBlock2D"] * 2, "UpBlock2D"],
)
UPSCALER = SD1 | dict(
    block_out_channels=[256, 512, 512, 1024],
    cross_attention_dim=1024,
    down_block_types=["DownBlock2D", *["CrossAttnDownBlock2D"] * 3],
    dual_cross_attention=False,
    in_channels=7,
    num_class_embeds=1000,
    only_cross_attention=[True, True, True, False],
    sample_size=128,
    up_block_types=[*["CrossAttnUpBlock2D"] * 3, "UpBlock2D"],
    use_linear_projection=True,
)
CELEBA = dict(
    _class_name="UNet2DModel",
    _diffusers_version="0.1.2",
    act_fn="silu",
    attention_head_dim=32,
    block_out_channels=[224, 448, 672, 896],
    center_input_sample=False,
    down_block_types=["DownBlock2D", *["AttnDownBlock2D"] * 3],
    downsample_padding=1,
    flip_sin_to_cos=True,
    freq_shift=0,
    in_channels=3,
    layers_per_block=2,
    mid_block_scale_factor=1,
    norm_eps=1e-05,
    norm_num_groups=32,
    out_channels=3,
    sample_size=64,
    time_embedding_type="positional",
    up_block_types=[*["AttnUpBlock2D"] * 3, "UpBlock2D"],
)

# name: config, number of parameters, channels of the spatial condition
UNETS = {
    "Stable Diffusion 1": (SD1, 859_520_964, 0),
    "Stable Diffusion 2": (SD2, 865_910_724, 0),
    "Stable Diffusion 2.1 v": (SD2 | dict(sample_size=96, upcast_attention=True), 865_910_724, 0),
    "SDXL base": (SDXL, 2_567_463_684, 0),
    "SDXL refiner": (REFINER, 2_259_526_660, 0),
    "inpainting": (SD1 | dict(in_channels=9, sample_size=64), 859_535_364, 5),
    "inpainting 2": (SD2 | dict(in_channels=9), 865_925_124, 5),
    "instruct-pix2pix": (SD1 | dict(in_channels=8), 859_532_484, 4),
    "depth": (SD2 | dict(in_channels=5, sample_size=32), 865_913_604, 1),
    "x4 upscaler": (UPSCALER, 473_398_020, 3),
    "image variation": (SD1, 859_520_964, 0),
    "unCLIP": (UNCLIP, 870_173_124, 0),
    "unCLIP small": (UNCLIP | dict(projection_class_embeddings_input_dim=1536), 869_517_764, 0),
    "latent diffusion, text": (
        SD1 | dict(cross_attention_dim=1280, sample_size=32),
        872_300_484,
        0,
    ),
    "latent diffusion, faces": (CELEBA, 274_056_163, 0),
}

CONTROLNET = dict(
    _class_name="ControlNetModel",
    _diffusers_version="0.16.0.dev0",
    act_fn="silu",
    attention_head_dim=8,
    block_out_channels=[320, 640, 1280, 1280],
    class_embed_type=None,
    conditioning_embedding_out_channels=[16, 32, 96, 256],
    controlnet_conditioning_channel_order="rgb",
    cross_attention_dim=768,
    down_block_types=LEVELS["down_block_types"],
    downsample_padding=1,
    flip_sin_to_cos=True,
    freq_shift=0,
    global_pool_conditions=False,
    in_channels=4,
    layers_per_block=2,
    mid_block_scale_factor=1,
    norm_eps=1e-05,
    norm_num_groups=32,
    num_class_embeds=None,
    only_cross_attention=False,
    projection_class_embeddings_input_dim=None,
    resnet_time_scale_shift="default",
    upcast_attention=False,
    use_linear_projection=False,
)
CONTROLNETS = {
    "Stable Diffusion 1": (CONTROLNET, 361_279_120),
    "shuffle": (CONTROLNET | dict(global_pool_conditions=True), 361_279_120),
    "Stable Diffusion 2": (
        CONTROLNET
        | dict(
            attention_head_dim=[5, 10, 20, 20], cross_attention_dim=1024, use_linear_projection=True
        ),
        364_228_240,
    ),
    "SDXL": (
        CONTROLNET
        | {
            key: SDXL[key]
            for key in (
                "addition_embed_type",
                "addition_embed_type_num_heads",
                "addition_time_embed_dim",
                "attention_head_dim",
                "block_out_channels",
                "cross_attention_dim",
                "down_block_types",
                "encoder_hid_dim",
                "encoder_hid_dim_type",
                "num_attention_heads",
                "projection_class_embeddings_input_dim",
                "transformer_layers_per_block",
                "upcast_attention",
                "use_linear_projection",
            )
        }
        | dict(
            conditioning_channels=3,
            mid_block_type="UNetMidBlock2DCrossAttn",
        ),
        1_251_014_160,
    ),
}
