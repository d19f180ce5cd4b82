"""Small pipelines of diffusers with random weights, and what compares ours with them."""

import numpy as np
import pytest

from tests import clip_files
from tests.parity import weights

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

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


def close(images, expected, bound=2e-3):
    """Ours in [-1, 1] against theirs, clipped to [0, 1]."""
    assert images.shape == expected.shape
    assert np.isfinite(images).all()
    assert np.abs(np.clip(np.asarray(images) / 2 + 0.5, 0, 1) - expected).max() < bound


def shown(x):
    """Images as pipelines of diffusers take them: [b, c, h, w] in [-1, 1]."""
    return first(x)
