import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import ldm_jax
from ldm_jax.diffusion import paths
from ldm_jax.models import clip, text, unclip
from ldm_jax.nn import embeddings
from ldm_jax.pretrained import components, kinds, single_files, variations
from ldm_jax.weights import (
    bert,
    files,
    original,
    original_noise,
    original_unclip,
    recognise,
    scheduler,
)
from ldm_jax.weights import unclip as their_unclip
from tests import bert_files, tiny
from tests import pretrained_folder as reduced
from tests.drawn import count, like

NOISE = dict(_class_name="DDIMScheduler", beta_schedule="scaled_linear", clip_sample=False)
UNET = dict(
    sample_size=4,
    in_channels=3,
    out_channels=3,
    block_out_channels=(8, 16),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=8,
    norm_num_groups=4,
)
VQ = dict(
    block_out_channels=(8, 16),
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    norm_num_groups=4,
    num_vq_embeddings=16,
)


def write(folder, kind, networks=(), others=()):
    """A folder of diffusers: {name: (class, config)} with drawn weights, and {name: (class, file, config)}."""
    index = {"_class_name": kind, "nothing": [None, None]}
    for name, (of, config) in dict(networks).items():
        made = components.make(of, config, jnp.float32)
        index[name] = [made.library, of]
        files.write(folder / name / f"{made.stem}.safetensors", made.export(like(made.shapes)))
        (folder / name / "config.json").write_text(json.dumps(config))
    for name, (of, file, config) in dict(others).items():
        index[name] = ["diffusers", of]
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / file).write_text(json.dumps(config))
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


SCHEDULER = {"scheduler": ("DDIMScheduler", "scheduler_config.json", NOISE)}


@pytest.fixture(scope="module")
def celeba(tmp_path_factory):
    networks = {"unet": ("UNet2DModel", UNET), "vqvae": ("VQModel", VQ)}
    return write(tmp_path_factory.mktemp("celeba"), "LDMPipeline", networks, SCHEDULER)


def test_an_unconditional_picture_is_that_of_its_seed(celeba, tmp_path):
    pipe = ldm_jax.from_pretrained(celeba)
    assert float(pipe.arrays["scale"]) == 1.0  # the paper's, where the config does not tell
    two = pipe.unconditional(2, steps=2, seed=5)
    assert two.shape == (2, 8, 8, 3)
    np.testing.assert_allclose(pipe.unconditional(2, steps=2, seed=6)[0], two[1], atol=1e-4)
    assert np.abs(two[0] - two[1]).max() > 0.01
    with pytest.raises(ValueError, match="n=0 pictures"):
        pipe.unconditional(0)
    with pytest.raises(ValueError, match="use a verb without a prompt"):
        pipe.text_to_image("a cat")
    pipe.save_pretrained(tmp_path / "again")
    index = json.loads((celeba / "model_index.json").read_text())
    assert json.loads((tmp_path / "again" / "model_index.json").read_text()) == index
    before = sorted(p.relative_to(celeba) for p in celeba.rglob("*"))
    assert sorted(p.relative_to(tmp_path / "again") for p in (tmp_path / "again").rglob("*")) == [
        *before
    ]
    name = "vqvae/diffusion_pytorch_model.safetensors"
    old, new = (files.read(at / name) for at in (celeba, tmp_path / "again"))
    for key in old:
        np.testing.assert_array_equal(np.asarray(new[key]), np.asarray(old[key]))


@pytest.mark.parametrize(
    ("kind", "names", "message"),
    [
        (
            "StableDiffusion3Pipeline",
            ("transformer", "vae", "scheduler"),
            "its component 'unet' is missing; a component 'transformer' is not known here",
        ),
        ("LDMPipeline", ("unet", "vae", "scheduler"), "its component 'vqvae' is missing"),
        ("LDMSuperResolutionPipeline", ("unet", "scheduler"), "its component 'vqvae' is missing"),
        ("LDMTextToImagePipeline", ("unet", "vqvae", "scheduler"), "'bert' is missing; "),
        ("StableDiffusionImageVariationPipeline", ("unet", "vae", "scheduler"), "'image_encoder'"),
        ("StableUnCLIPImg2ImgPipeline", ("unet", "vae", "scheduler"), "'image_normalizer' is miss"),
        ("StableUnCLIPPipeline", ("unet", "vae", "scheduler", "prior"), "'prior' is not known"),
    ],
)
def test_components_that_a_class_lacks_or_that_nobody_knows_are_told(
    kind, names, message, tmp_path
):
    others = {name: ("Model", "config.json", {}) for name in names if name != "scheduler"}
    folder = write(tmp_path, kind, others=others | SCHEDULER)
    with pytest.raises(ValueError, match=message):
        ldm_jax.from_pretrained(folder)


def test_super_resolution(tmp_path, monkeypatch):
    """Each picture by its small one and its seed; latents are not scaled, whatever the config says."""
    reads = UNET | dict(in_channels=6)
    networks = {"unet": ("UNet2DModel", reads), "vqvae": ("VQModel", VQ | dict(scaling_factor=0.2))}
    folder = write(tmp_path / "sr", "LDMSuperResolutionPipeline", networks, SCHEDULER)
    pipe = ldm_jax.from_pretrained(folder)
    assert float(pipe.arrays["scale"]) == 1.0
    small = np.random.default_rng(0).uniform(-1, 1, (2, 4, 4, 3)).astype(np.float32)
    large = pipe.super_resolution(small, steps=2)
    assert large.shape == (2, 8, 8, 3)
    other = pipe.super_resolution(np.stack([small[1], small[1]]), steps=2)
    np.testing.assert_allclose(other[1], large[1], atol=1e-4)
    assert np.abs(other[0] - large[0]).max() > 0.01
    # As outside of pytest, where annotations are not checked.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=r"give \[b, h, w, 3\]"):
        pipe.super_resolution(small[..., :1])
    with pytest.raises(ValueError, match="it is a model for super_resolution"):
        pipe.unconditional(1)
    with pytest.raises(ValueError, match="use a verb without a prompt"):
        pipe.upscale("a cat", small[:1])
    pipe.save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "vqvae" / "config.json").read_text())
    assert config["scaling_factor"] == 0.2


def test_a_class_of_a_component_that_is_not_known_is_told(tmp_path):
    others = {"vqvae": ("AsymmetricVQ", "config.json", {})}
    networks = {"unet": ("UNet2DModel", UNET)}
    folder = write(tmp_path, "LDMPipeline", networks, others | SCHEDULER)
    with pytest.raises(ValueError, match="of the class AsymmetricVQ is not known here"):
        ldm_jax.from_pretrained(folder)


def test_a_single_file_without_its_image_encoder_is_refused():
    clip_text = dict(architectures=["CLIPTextModel"])
    found = recognise.Recognised(
        "stable-diffusion-2-unclip", {"unet": {}, "vae": {}, "text_encoder": clip_text}, {}
    )
    with pytest.raises(ValueError, match="has no image encoder"):
        single_files._index(Path("one.safetensors"), found)


def test_components_keep_their_names_in_files():
    index = {"vqvae": ["diffusers", "VQModel"], "unet": ["diffusers", "UNet2DModel"]}
    assert kinds.renamed({"vqvae": 1, "unet": 2}) == {"vae": 1, "unet": 2}
    assert kinds.stored_name("vae", index) == "vqvae"
    assert kinds.stored_name("text_encoder", index) == "text_encoder"
    assert kinds.stored_name("vae", {"vae": []}) == "vae"


# ---- the text encoder ----------------------------------------------------------------------------

# `bert/config.json` of CompVis/ldm-text2im-large-256, as diffusers' defaults have it.
PUBLISHED = dict(
    _name_or_path="ldm-bert",
    activation_dropout=0.0,
    activation_function="gelu",
    architectures=["LDMBertModel"],
    attention_dropout=0.0,
    classifier_dropout=0.0,
    d_model=1280,
    dropout=0.1,
    encoder_attention_heads=8,
    encoder_ffn_dim=5120,
    encoder_layerdrop=0.0,
    encoder_layers=32,
    head_dim=64,
    init_std=0.02,
    max_position_embeddings=77,
    model_type="ldmbert",
    num_hidden_layers=32,
    pad_token_id=0,
    scale_embedding=False,
    torch_dtype="float32",
    transformers_version="4.20.0.dev0",
    use_cache=True,
    vocab_size=30522,
)


def test_the_published_text_encoder():
    made = components.make("LDMBertModel", PUBLISHED, jnp.float32)
    d, inner, hidden = 1280, 512, 5120
    layer = 4 * d * inner + d + 4 * d + 2 * d * hidden + hidden + d
    assert count(made.shapes) == (30522 + 77) * d + 32 * layer + 2 * d
    again = bert.from_config(bert.to_config(made.module))
    assert again == made.module == text.TextTransformer(30522, 1280, 32)
    small = components.make(
        "LDMBertModel",
        PUBLISHED | dict(vocab_size=9, d_model=4, encoder_layers=1, encoder_ffn_dim=16),
        jnp.float32,
    )
    assert {*small.export(like(small.shapes))} == {
        "model.embed_tokens.weight",
        "model.embed_positions.weight",
        "model.layers.0.self_attn_layer_norm.weight",
        "model.layers.0.self_attn_layer_norm.bias",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.0.self_attn.v_proj.weight",
        "model.layers.0.self_attn.out_proj.weight",
        "model.layers.0.self_attn.out_proj.bias",
        "model.layers.0.final_layer_norm.weight",
        "model.layers.0.final_layer_norm.bias",
        "model.layers.0.fc1.weight",
        "model.layers.0.fc1.bias",
        "model.layers.0.fc2.weight",
        "model.layers.0.fc2.bias",
        "model.layer_norm.weight",
        "model.layer_norm.bias",
    }


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(activation_function="relu"), "activation_function = 'relu'"),
        (dict(encoder_ffn_dim=1280), "four times the width only"),
        (dict(relative_positions=True), "relative_positions = True"),
    ],
)
def test_another_text_encoder_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        bert.from_config(PUBLISHED | changed)


# ---- embeddings of images ------------------------------------------------------------------------

MEAN, STD = jnp.array([[1.0, -2.0, 0.5, 3.0]]), jnp.array([[0.5, 2.0, 1.0, 4.0]])
NORMALIZER = unclip.Normalizer(4)
LEVELS = dict(_class_name="DDPMScheduler", beta_schedule="squaredcos_cap_v2")


def test_the_normalizer_brings_embeddings_to_mean_0_and_deviation_1():
    params = {"params": {"mean": MEAN, "std": STD}}
    x = MEAN + STD * jax.random.normal(jax.random.key(0), (4000, 4))
    y = NORMALIZER.apply(params, x)
    np.testing.assert_allclose(y.mean(0), 0, atol=0.06)
    np.testing.assert_allclose(y.std(0), 1, atol=0.06)
    np.testing.assert_allclose(NORMALIZER.apply(params, y, method="inverse"), x, atol=1e-5)
    assert their_unclip.from_config(their_unclip.to_config(NORMALIZER)) == NORMALIZER


def test_noise_comes_to_embeddings_where_they_are_normal():
    pipe = SimpleNamespace(
        schedulers={"image_noising_scheduler": LEVELS},
        vision={"image_normalizer": {"mean": MEAN, "std": STD}},
        components={"image_normalizer": SimpleNamespace(module=NORMALIZER)},
    )
    x, noise = MEAN + STD * jnp.array([[1.0], [-1.0]]), jnp.full((2, 4), 0.25)
    found = variations._noised(pipe, x, 300, noise, seed=0)
    path = paths.ddpm("squared_cosine", steps=1000)
    alpha, sigma = (float(f(jnp.float32(300 / 999))) for f in (path.alpha, path.sigma))
    z = jnp.array([[alpha], [-alpha]]) + sigma * 0.25
    np.testing.assert_allclose(found[:, :4], MEAN + STD * z, atol=1e-5)
    np.testing.assert_allclose(found[:, 4:], embeddings.sinusoid(jnp.full(2, 300.0), 4), atol=1e-5)
    drawn = [variations._noised(pipe, x, 900, None, seed) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert np.abs(drawn[0] - drawn[2]).max() > 0.1
    with pytest.raises(ValueError, match="noise_level=-1 is outside of 0 to 999"):
        variations._noised(pipe, x, -1, None, 0)
    with pytest.raises(ValueError, match=r"noise of shape \(2, 3\)"):
        variations._noised(pipe, x, 1, noise[:, :3], 0)


def test_images_that_cannot_be_seen_are_refused():
    pipe = SimpleNamespace(components={}, processors={})
    x = np.zeros((1, 8, 8, 3), np.float32)
    with pytest.raises(ValueError, match="no image encoder"):
        variations.encode_image(pipe, x)
    pipe.components["image_encoder"] = None
    pipe.processors["feature_extractor"] = dict(image_mean=[0.5] * 3, image_std=list(clip.STD))
    with pytest.raises(ValueError, match=r"image_mean=\[0.5, 0.5, 0.5\]"):
        variations.encode_image(pipe, x)
    pipe.processors["feature_extractor"]["image_mean"] = list(clip.MEAN)
    with pytest.raises(ValueError, match=r"images of shape \(1, 8, 8, 4\)"):
        variations.encode_image(pipe, np.zeros((1, 8, 8, 4), np.float32))


def betas(schedule):
    """As their code makes them."""
    t = np.arange(1001) / 1000
    levels = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
    return {
        "scaled_linear": np.linspace(1e-4**0.5, 0.02**0.5, 1000) ** 2,
        "linear": np.linspace(1e-4, 0.02, 1000),
        "squaredcos_cap_v2": np.minimum(1 - levels[1:] / levels[:-1], 0.999),
    }[schedule].astype(np.float32)


@pytest.mark.parametrize("schedule", ["scaled_linear", "linear", "squaredcos_cap_v2"])
def test_a_second_table_of_noise_is_that_of_its_buffers(schedule):
    for name, prefix in (
        ("low_res_scheduler", "low_scale_model."),
        ("image_noising_scheduler", "noise_augmentor."),
    ):
        given = betas(schedule)
        config = original_noise.scheduler(name, {f"{prefix}betas": given})
        assert config["beta_schedule"] == schedule
        path, _ = scheduler.path_and_target(config)
        t = jnp.linspace(0, 1, 1000)
        np.testing.assert_allclose(
            path.alpha(t) ** 2, np.cumprod(1 - given.astype(float)), rtol=2e-3, atol=1e-6
        )
        with pytest.raises(ValueError, match="is of none of the schedules"):
            original_noise.scheduler(name, {f"{prefix}betas": given**1.1})
    published = original_noise.scheduler("low_res_scheduler", {})
    assert (published["beta_start"], published["beta_end"]) == (1e-4, 0.02)


# ---- single files in the original layout --------------------------------------------------------


def assert_the_same_from_a_single_file(folder, tmp_path):
    pipe = ldm_jax.from_pretrained(folder)
    path = tmp_path / "single.safetensors"
    pipe.save_pretrained(path, layout="original")
    again = ldm_jax.from_pretrained(path, config=folder)
    assert again.index["_class_name"] == pipe.index["_class_name"]
    tiny.assert_equal(again.component_params(), pipe.component_params())
    assert float(again.arrays["scale"]) == float(pipe.arrays["scale"])
    again.save_pretrained(tmp_path / "folder")
    tiny.assert_equal(
        ldm_jax.from_pretrained(tmp_path / "folder").component_params(), pipe.component_params()
    )
    return again


def test_an_unconditional_model_of_a_single_file(celeba, tmp_path):
    again = assert_the_same_from_a_single_file(celeba, tmp_path)
    assert again.tokenizers == {}
    names = files.read(tmp_path / "single.safetensors")
    assert "first_stage_model.quantize.embedding.weight" in names
    assert "model.diffusion_model.middle_block.1.qkv.weight" in names
    # Averages of the U-Net's weights, under the names that their code gives them.
    tensors = {name: np.asarray(tensor) for name, tensor in names.items()}
    for name in [name for name in tensors if name.startswith("model.diffusion_model.")]:
        average = "model_ema." + name.removeprefix("model.").replace(".", "")
        tensors[average] = tensors[name] + 1
    files.write(tmp_path / "averaged.safetensors", tensors)
    mean = ldm_jax.from_pretrained(tmp_path / "averaged.safetensors", config=celeba, ema=True)
    expected = jax.tree.map(lambda leaf: leaf + 1, again.params["network"])
    tiny.assert_equal(mean.params["network"], expected)
    with pytest.raises(ValueError, match="the file lacks"):
        ldm_jax.from_pretrained(tmp_path / "single.safetensors", config=celeba, ema=True)


def test_a_text_model_of_latent_diffusion_of_a_single_file(tmp_path):
    unet = UNET | dict(
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
        cross_attention_dim=8,
    )
    vae = {k: v for k, v in VQ.items() if k != "num_vq_embeddings"} | dict(scaling_factor=0.3)
    text = PUBLISHED | dict(vocab_size=60, d_model=8, encoder_layers=2, encoder_ffn_dim=32)
    networks = {
        "unet": ("UNet2DConditionModel", unet),
        "vqvae": ("AutoencoderKL", vae),
        "bert": ("LDMBertModel", text),
    }
    folder = write(tmp_path / "theirs", "LDMTextToImagePipeline", networks, SCHEDULER)
    bert_files.write(folder / "tokenizer")
    index = json.loads((folder / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", "BertTokenizer"]
    (folder / "model_index.json").write_text(json.dumps(index))
    again = assert_the_same_from_a_single_file(folder, tmp_path)
    assert again.index["bert"] == ["latent_diffusion", "LDMBertModel"]
    assert again.tokenize(["a cat"]).shape == (1, 77)


def test_an_upscaler_of_a_single_file(tmp_path):
    low = dict(_class_name="DDPMScheduler", beta_schedule="scaled_linear")
    low |= dict(beta_start=1e-4, beta_end=0.02)
    folder = reduced.write(tmp_path / "up", in_channels=7, num_class_embeds=1000, low_res=low)
    pipe = ldm_jax.from_pretrained(folder)
    path = tmp_path / "single.safetensors"
    pipe.save_pretrained(path, layout="original")
    tensors = {name: np.asarray(tensor) for name, tensor in files.read(path).items()}
    tensors["low_scale_model.betas"] = betas("squaredcos_cap_v2")
    files.write(tmp_path / "other.safetensors", tensors)
    config = {
        "unet": reduced.UNET | dict(in_channels=7, num_class_embeds=1000),
        "vae": {"norm_num_groups": 4, "scaling_factor": 0.08333},
        "text_encoder": reduced.TEXT,
        "scheduler": reduced.SCHEDULER | {"prediction_type": "v_prediction"},
    }
    given = dict(config=config, tokenizers=[folder / "tokenizer"])
    again = ldm_jax.from_pretrained(path, **given)
    tiny.assert_equal(again.component_params(), pipe.component_params())
    assert again.index["_class_name"] == "StableDiffusionUpscalePipeline"
    assert again.index["low_res_scheduler"] == ["diffusers", "DDPMScheduler"]
    found = scheduler.read(again.schedulers["low_res_scheduler"])
    assert found == scheduler.read(low)
    other = ldm_jax.from_pretrained(tmp_path / "other.safetensors", **given)
    assert other.schedulers["low_res_scheduler"]["beta_schedule"] == "squaredcos_cap_v2"


def unclip_file(width, dim=8):
    """Names of the image encoder of a single file, drawn; it is as small as 16 heads may be."""
    config = dict(
        architectures=["CLIPVisionModelWithProjection"],
        hidden_size=width,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=16,
        hidden_act="gelu",
        image_size=8,
        patch_size=4,
        projection_dim=dim,
    )
    made = components.make("CLIPVisionModelWithProjection", config, jnp.float32)
    return made, original.to_original([(original_unclip.vision(), like(made.shapes))])


def test_the_image_encoder_of_a_single_file():
    made, tensors = unclip_file(32)
    assert tensors["embedder.model.visual.transformer.resblocks.1.attn.in_proj_weight"].shape == (
        96,
        32,
    )
    found = original_unclip.recognise(tensors)
    again = components.make(
        "CLIPVisionModelWithProjection", found.configs["image_encoder"], jnp.float32
    )
    assert again.module == made.module
    assert {k: float(v.mean()) for k, v in found.made["image_normalizer"].items()} == dict(
        mean=0, std=1
    )
    large = {"embedder.model.visual.conv1.weight": jax.ShapeDtypeStruct((1024, 3, 4, 4), float)}
    with pytest.raises(ValueError, match="lacks the mean and deviation"):
        original_unclip.recognise(tensors | large)


def test_stable_unclip_of_a_single_file(tmp_path):
    made, _ = unclip_file(32)
    folder = reduced.write(
        tmp_path / "unclip", class_embed_type="projection", projection_class_embeddings_input_dim=16
    )
    index = json.loads((folder / "model_index.json").read_text())
    for name, kind, config in (
        ("image_encoder", "CLIPVisionModelWithProjection", dict(made.config)),
        ("image_normalizer", "StableUnCLIPImageNormalizer", dict(embedding_dim=8)),
    ):
        reduced.component(folder / name, kind, config, 9)
        index[name] = [components.KINDS[kind].library, kind]
    reduced.put(folder / "image_noising_scheduler" / "scheduler_config.json", LEVELS)
    index |= {"image_noising_scheduler": ["diffusers", "DDPMScheduler"]}
    index["_class_name"] = "StableUnCLIPImg2ImgPipeline"
    reduced.put(folder / "model_index.json", index)
    again = assert_the_same_from_a_single_file(folder, tmp_path)
    assert again.schedulers["image_noising_scheduler"]["beta_schedule"] == "squaredcos_cap_v2"
    assert again.processors["feature_extractor"]["image_processor_type"] == "CLIPImageProcessor"
    # What published files have beside, and without statistics: those of the folder's are not read.
    tensors = {k: np.asarray(v) for k, v in files.read(tmp_path / "single.safetensors").items()}
    tensors = {k: v for k, v in tensors.items() if ".data_" not in k}
    tensors |= {"noise_augmentor.betas": betas("squaredcos_cap_v2")}
    tensors |= {"embedder.model.ln_final.weight": np.ones(3, np.float32)}
    files.write(tmp_path / "published.safetensors", tensors)
    found = ldm_jax.from_pretrained(tmp_path / "published.safetensors", config=folder)
    np.testing.assert_array_equal(found.vision["image_normalizer"]["mean"], 0)
