"""YAML files of CompVis' and Stability's repositories, reduced to what says how networks are built."""

import copy

import pytest
import yaml

from ldm_jax.weights import original_configs
from ldm_jax.weights.original_yaml import from_yaml

UNET = dict(
    image_size=32,
    in_channels=4,
    out_channels=4,
    model_channels=320,
    attention_resolutions=[4, 2, 1],
    num_res_blocks=2,
    channel_mult=[1, 2, 4, 4],
    use_spatial_transformer=True,
    transformer_depth=1,
    use_checkpoint=True,
    legacy=False,
)
DDCONFIG = dict(
    double_z=True,
    z_channels=4,
    resolution=256,
    in_channels=3,
    out_ch=3,
    ch=128,
    ch_mult=[1, 2, 4, 4],
    num_res_blocks=2,
    attn_resolutions=[],
    dropout=0.0,
)


def target(name, **params):
    return dict(target=name, params=params)


def latent(unet, first, condition, **params):
    unet = target("ldm.modules.diffusionmodules.openaimodel.UNetModel", **UNET | unet)
    params |= dict(unet_config=unet, first_stage_config=first, cond_stage_config=condition)
    return dict(model=target("ldm.models.diffusion.ddpm.LatentDiffusion", **params))


KL = target(
    "ldm.models.autoencoder.AutoencoderKL",
    embed_dim=4,
    monitor="val/rec_loss",
    ddconfig=DDCONFIG,
    lossconfig=dict(target="torch.nn.Identity"),
)
SD = dict(linear_start=0.00085, linear_end=0.0120, timesteps=1000, scale_factor=0.18215)
V1 = latent(
    dict(num_heads=8, context_dim=768),
    KL,
    dict(target="ldm.modules.encoders.modules.FrozenCLIPEmbedder"),
    **SD,
)
V2 = latent(
    dict(num_head_channels=64, use_linear_in_transformer=True, context_dim=1024, use_fp16=True),
    KL,
    target("ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder", freeze=True, layer="penultimate"),
    parameterization="v",
    **SD,
)
TXT2IMG = latent(
    dict(num_heads=8, context_dim=1280),
    KL,
    target("ldm.modules.encoders.modules.BERTEmbedder", n_embed=1280, n_layer=32),
    **SD | {"linear_end": 0.012},
)
CELEBAHQ = latent(
    dict(
        image_size=64,
        in_channels=3,
        out_channels=3,
        model_channels=224,
        attention_resolutions=[8, 4, 2],
        channel_mult=[1, 2, 3, 4],
        num_head_channels=32,
        use_spatial_transformer=False,
    ),
    target(
        "ldm.models.autoencoder.VQModelInterface",
        embed_dim=3,
        n_embed=8192,
        ckpt_path="models/first_stage_models/vq-f4/model.ckpt",
        ddconfig=DDCONFIG | dict(double_z=False, z_channels=3, ch_mult=[1, 2, 4]),
        lossconfig=dict(target="torch.nn.Identity"),
    ),
    "__is_unconditional__",
    linear_start=0.0015,
    linear_end=0.0195,
    timesteps=1000,
)
EMBEDDERS = [
    target("sgm.modules.FrozenCLIPEmbedder", layer="hidden", layer_idx=11) | {"input_key": "txt"},
    target("sgm.modules.FrozenOpenCLIPEmbedder2", arch="ViT-bigG-14", layer="penultimate"),
    target("sgm.modules.ConcatTimestepEmbedderND", outdim=256),
]
XL = dict(
    model=target(
        "sgm.models.diffusion.DiffusionEngine",
        scale_factor=0.13025,
        denoiser_config=target(
            "sgm.modules.diffusionmodules.denoiser.DiscreteDenoiser",
            num_idx=1000,
            scaling_config=dict(target="sgm.modules.diffusionmodules.denoiser_scaling.EpsScaling"),
        ),
        network_config=target(
            "sgm.modules.diffusionmodules.openaimodel.UNetModel",
            adm_in_channels=2816,
            num_classes="sequential",
            use_checkpoint=True,
            in_channels=4,
            out_channels=4,
            model_channels=320,
            attention_resolutions=[4, 2],
            num_res_blocks=2,
            channel_mult=[1, 2, 4],
            num_head_channels=64,
            use_linear_in_transformer=True,
            use_spatial_transformer=True,
            transformer_depth=[1, 2, 10],
            context_dim=2048,
            spatial_transformer_attn_type="softmax-xformers",
        ),
        conditioner_config=target("sgm.modules.GeneralConditioner", emb_models=EMBEDDERS),
        first_stage_config=target(
            "sgm.models.autoencoder.AutoencoderKL",
            embed_dim=4,
            ddconfig=DDCONFIG | {"attn_type": "vanilla-xformers"},
        ),
    )
)


@pytest.fixture
def read(tmp_path):
    def read(content):
        path = tmp_path / "model.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return from_yaml(path)

    return read


def subset(config, **expected):
    assert {k: config.get(k) for k in expected} == expected


def test_stable_diffusion_1(read):
    found = read(V1)
    assert found.keys() == {"unet", "vae", "scheduler", "text_encoder"}
    subset(
        found["unet"],
        _class_name="UNet2DConditionModel",
        in_channels=4,
        block_out_channels=(320, 640, 1280, 1280),
        down_block_types=(*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        attention_head_dim=8,
        cross_attention_dim=768,
        use_linear_projection=False,
        transformer_layers_per_block=1,
    )
    subset(
        found["vae"],
        _class_name="AutoencoderKL",
        block_out_channels=(128, 256, 512, 512),
        latent_channels=4,
        scaling_factor=0.18215,
        down_block_types=("DownEncoderBlock2D",) * 4,
    )
    subset(found["scheduler"], beta_start=0.00085, beta_end=0.012, prediction_type="epsilon")
    subset(
        found["text_encoder"],
        architectures=["CLIPTextModel"],
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        hidden_act="quick_gelu",
    )


def test_stable_diffusion_2(read):
    found = read(V2)
    subset(found["unet"], attention_head_dim=(5, 10, 20, 20), use_linear_projection=True)
    assert found["scheduler"]["prediction_type"] == "v_prediction"
    subset(found["text_encoder"], hidden_size=1024, num_hidden_layers=23, hidden_act="gelu")


def test_a_second_table_of_noise(read):
    """The upscaler's small images, and embeddings of images."""
    content = copy.deepcopy(V2)
    params = content["model"]["params"]
    noise = dict(linear_start=0.001, linear_end=0.01)
    params["low_scale_config"] = target("upscaling.Noise", noise_schedule_config=noise)
    cosine = dict(timesteps=500, beta_schedule="squaredcos_cap_v2")
    params["noise_aug_config"] = target("upscaling.Noise", noise_schedule_config=cosine)
    found = read(content)
    subset(found["low_res_scheduler"], beta_schedule="scaled_linear", beta_start=0.001)
    subset(
        found["image_noising_scheduler"],
        beta_schedule="squaredcos_cap_v2",
        num_train_timesteps=500,
    )
    cosine["beta_schedule"] = "sigmoid"
    with pytest.raises(ValueError, match="'sigmoid' is unknown"):
        read(content)


def test_stable_diffusion_xl(read):
    found = read(XL)
    subset(
        found["unet"],
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        attention_head_dim=(5, 10, 20),
        transformer_layers_per_block=[1, 2, 10],
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    assert found["vae"]["scaling_factor"] == 0.13025
    subset(found["scheduler"], beta_end=0.012, prediction_type="epsilon")
    subset(found["text_encoder"], hidden_size=768, architectures=["CLIPTextModel"])
    subset(
        found["text_encoder_2"],
        num_hidden_layers=32,
        projection_dim=1280,
        architectures=["CLIPTextModelWithProjection"],
    )
    refiner = copy.deepcopy(XL)
    refiner["model"]["params"]["conditioner_config"]["params"]["emb_models"] = EMBEDDERS[1:]
    refined = read(refiner)
    assert "text_encoder" not in refined
    assert refined["text_encoder_2"] == found["text_encoder_2"]


def test_text_to_image_of_the_paper(read):
    found = read(TXT2IMG)
    subset(found["unet"], cross_attention_dim=1280, attention_head_dim=8)
    assert found["text_encoder"] == original_configs.bert_text(width=1280, layers=32)


def test_faces_of_the_paper(read):
    found = read(CELEBAHQ)
    assert found.keys() == {"unet", "vae", "scheduler"}
    subset(
        found["unet"],
        _class_name="UNet2DModel",
        block_out_channels=(224, 448, 672, 896),
        attention_head_dim=32,
        down_block_types=("DownBlock2D", *("AttnDownBlock2D",) * 3),
    )
    subset(
        found["vae"],
        _class_name="VQModel",
        num_vq_embeddings=8192,
        vq_embed_dim=3,
        latent_channels=3,
        scaling_factor=1.0,
    )
    subset(found["scheduler"], beta_start=0.0015, beta_end=0.0195)


def changed(content, **more):
    content = copy.deepcopy(content)
    params = content["model"]["params"]
    for key, value in more.items():
        unet = params["unet_config"]["params"]
        (params if key in ("scale_by_std", "scale_factor", "beta_schedule") else unet)[key] = value
    return content


def test_settings_that_we_lack_are_told(read, tmp_path):
    for wrong, told in (
        (dict(dims=3), "dims = 3"),
        (dict(num_res_blocks=[1, 2, 2, 2]), "differ by level"),
        (dict(new_setting=5), r"new_setting = 5 \(unknown\)"),
        (dict(beta_schedule="cosine"), "'cosine' is unknown"),
        (dict(resblock_updown=True), "UNet2DConditionModel"),
    ):
        with pytest.raises(ValueError, match=told):
            read(changed(V1, **wrong))
    with pytest.raises(ValueError, match="same at all levels"):  # LSUN churches
        read(changed(CELEBAHQ, num_head_channels=-1, num_heads=8))
    measured = changed(CELEBAHQ, scale_by_std=True)
    with pytest.raises(ValueError, match="scale_by_std"):
        read(measured)
    assert read(changed(measured, scale_factor=0.5))["vae"]["scaling_factor"] == 0.5
    for broken in ("model: [", "model: 3", "a: b", "", "model: {params: {unet_config: 3}}"):
        with pytest.raises(ValueError, match="no YAML file of CompVis"):
            read(broken)
    with pytest.raises(ValueError, match="no YAML file of CompVis"):
        read("model: !!python/object/apply:os.system ['true']")
    with pytest.raises(FileNotFoundError):
        from_yaml(tmp_path / "none.yaml")
