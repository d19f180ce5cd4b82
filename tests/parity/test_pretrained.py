"""Whole folders of diffusers' pipelines: loaded, used and written back, against diffusers itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ldm_jax
from tests import clip_files
from tests.parity import weights

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

NOISE = dict(
    beta_schedule="scaled_linear",
    beta_start=0.00085,
    beta_end=0.012,
    set_alpha_to_one=False,
    clip_sample=False,
    steps_offset=1,
)


def tokenizer(folder, pad=clip_files.END):
    clip_files.write(folder, pad=pad)
    return transformers.CLIPTokenizer.from_pretrained(folder)


def text_encoder(vocab, width=32, act="quick_gelu", projection=None):
    config = transformers.CLIPTextConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        hidden_act=act,
        projection_dim=projection or 16,
        eos_token_id=2,
    )
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return weights.randomised(kind(config))


def unet(in_channels=4, cross=32, **settings):
    return weights.randomised(
        diffusers.UNet2DConditionModel(
            **dict(
                sample_size=8,
                in_channels=in_channels,
                block_out_channels=(16, 32),
                layers_per_block=1,
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                attention_head_dim=2,
                cross_attention_dim=cross,
                norm_num_groups=8,
            )
            | settings
        )
    )


def vae(**settings):
    return weights.randomised(
        diffusers.AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            sample_size=16,
            **settings,
        )
    )


def parts(tmp_path, in_channels=4, **noise):
    words = tokenizer(tmp_path / "words")
    return dict(
        vae=vae(),
        text_encoder=text_encoder(len(words)),
        tokenizer=words,
        unet=unet(in_channels),
        scheduler=diffusers.DDIMScheduler(**NOISE | noise),
    )


CHECKER = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def stable_diffusion(tmp_path, kind=diffusers.StableDiffusionPipeline, channels=4, **noise):
    pipe = kind(**parts(tmp_path, channels, **noise), **CHECKER)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path / "theirs")
    return pipe


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def first(x):
    """Channels first."""
    return torch.from_numpy(np.asarray(x)).permute(0, 3, 1, 2)


def error(ours, theirs):
    """Relative to the size of the reference, which is [b, h, w, c]."""
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


PROMPTS = ["a cat on a mat", "red, and Blue!"]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_text_to_image(prediction, tmp_path):
    theirs = stable_diffusion(tmp_path, prediction_type=prediction)
    pipe = ldm_jax.from_pretrained(tmp_path / "theirs")
    ids = theirs.tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=77).input_ids
    np.testing.assert_array_equal(pipe.tokenize(PROMPTS), ids)
    with torch.no_grad():
        tokens = theirs.text_encoder(torch.tensor(ids))[0]
    cond = pipe.encode_text(PROMPTS)
    assert error(np.asarray(cond.tokens), tokens.numpy()) < 1e-4
    z = random(2, 8, 8, 4)
    with torch.no_grad():
        out = theirs.unet(first(z), torch.tensor([3, 731]), tokens).sample
    assert weights.relative_error(pipe.predict(z, [3, 731], cond), out) < 1e-4
    x = np.clip(random(2, 16, 16, 3), -1, 1)
    with torch.no_grad():
        mean = theirs.vae.encode(first(x)).latent_dist.mean * theirs.vae.config.scaling_factor
        back = theirs.vae.decode(mean / theirs.vae.config.scaling_factor).sample
    ours = pipe.encode(x)
    assert weights.relative_error(np.asarray(ours), mean) < 1e-4
    assert weights.relative_error(pipe.decode(ours), back) < 1e-4
    for negative in (None, "a dog"):
        expected = theirs(
            PROMPTS,
            negative_prompt=None if negative is None else [negative] * 2,
            num_inference_steps=20,
            guidance_scale=7.5,
            latents=first(z),
            height=16,
            width=16,
            output_type="np",
        ).images
        images = pipe.text_to_image(PROMPTS, negative, steps=20, guidance=7.5, latents=z)
        assert images.shape == (2, 16, 16, 3)
        assert np.abs(np.clip(images / 2 + 0.5, 0, 1) - expected).max() < 2e-3


def test_back_to_diffusers(tmp_path):
    theirs = stable_diffusion(tmp_path)
    ldm_jax.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "ours")
    for name in ("unet", "vae", "text_encoder"):
        ours, before = (getattr(p, name).state_dict() for p in (again, theirs))
        assert ours.keys() == before.keys()
        for key, value in before.items():
            assert torch.equal(ours[key], value), (name, key)
    assert again.tokenizer(PROMPTS).input_ids == theirs.tokenizer(PROMPTS).input_ids
    ours, before = (dict(p.scheduler.config) for p in (again, theirs))
    before.pop("_use_default_values")
    assert ours == before
