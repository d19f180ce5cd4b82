"""Pipelines that are not Stable Diffusion with another input: loaded, used, written back, against diffusers itself."""

import random as python_random

import jax.numpy as jnp
import numpy as np
import pytest

import ldm_jax
from ldm_jax.models import clip
from ldm_jax.weights import prompts
from tests import bert_files
from tests.parity import weights

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
from diffusers.pipelines.latent_diffusion import pipeline_latent_diffusion as ldm  # noqa: E402
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import (  # noqa: E402
    StableUnCLIPImageNormalizer,
)

from tests.parity import pipelines as usual  # noqa: E402
from tests.parity.pipelines import close, first, random  # noqa: E402

pytestmark = pytest.mark.parity

TEXTS = ["A cat in the red house!", "Blue caf\u00e9s, painted"]
STEPS = dict(num_inference_steps=10, output_type="np")


def saved(pipe, folder):
    """Theirs as a folder, and ours from it."""
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder)
    return ldm_jax.from_pretrained(folder)


def the_same_again(pipe, theirs, folder, names, lost=()):
    """What we write has the tensors and configs of `theirs`; returns it as they load it."""
    pipe.save_pretrained(folder)
    again = type(theirs).from_pretrained(folder)
    again.set_progress_bar_config(disable=True)
    for name in names:
        ours, before = (getattr(p, name).state_dict() for p in (again, theirs))
        assert ours.keys() == before.keys()
        assert [k for k, v in before.items() if not torch.equal(ours[k], v) and k not in lost] == []
    ours, before = ({n for n, c in p.components.items() if c is None} for p in (again, theirs))
    assert ours == before
    return again


def vqvae(**settings):
    return weights.randomised(
        diffusers.VQModel(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            num_vq_embeddings=64,
            sample_size=16,
            **settings,
        )
    )


def plain_unet():
    return weights.randomised(
        diffusers.UNet2DModel(
            sample_size=8,
            in_channels=3,
            out_channels=3,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=8,
            norm_num_groups=8,
        )
    )


@pytest.mark.parametrize("noise", [{}, dict(steps_offset=1, set_alpha_to_one=False)])
def test_unconditional(noise, tmp_path):
    """With the scheduler of CompVis' folders, whose config says neither where a grid starts nor where it ends."""
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.0015,
        beta_end=0.0195,
        clip_sample=False,
        **noise,
    )
    theirs = diffusers.LDMPipeline(vqvae(scaling_factor=0.7), plain_unet(), scheduler)
    pipe = saved(theirs, tmp_path / "theirs")
    generator = torch.Generator().manual_seed(3)
    expected = theirs(batch_size=2, generator=generator, **STEPS).images
    z = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    z = z.permute(0, 2, 3, 1).numpy()
    # A latent half way between two entries of the codebook would decode to either; these do not.
    close(pipe.unconditional(2, steps=10, latents=z), expected)
    x = np.clip(random(2, 16, 16, 3), -1, 1)
    with torch.no_grad():
        latents = theirs.vqvae.encode(first(x)).latents * 0.7
    assert weights.relative_error(np.asarray(pipe.encode(x)), latents) < 1e-4
    with pytest.raises(ValueError, match="reads no text"):
        pipe.text_to_image("a cat")
    with pytest.raises(ValueError, match="no image encoder"):
        pipe.variations(x)
    again = the_same_again(pipe, theirs, tmp_path / "ours", ("vqvae", "unet"))
    assert again.vqvae.config.scaling_factor == 0.7


def bert(vocab):
    config = ldm.LDMBertConfig(
        vocab_size=vocab,
        encoder_layers=2,
        encoder_ffn_dim=4 * 24,
        d_model=24,
        encoder_attention_heads=3,
        head_dim=4,
    )
    return weights.randomised(ldm.LDMBertModel(config))


def deep_vae():
    """By a factor of 8, which the pipeline takes for granted."""
    return weights.randomised(
        diffusers.AutoencoderKL(
            block_out_channels=(8, 8, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=4,
            sample_size=64,
        )
    )


def test_text_to_image_of_latent_diffusion(tmp_path):
    words = transformers.BertTokenizer.from_pretrained(bert_files.write(tmp_path / "words"))
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False
    )
    theirs = diffusers.LDMTextToImagePipeline(
        vqvae=deep_vae(),
        bert=bert(len(words)),
        tokenizer=words,
        unet=usual.unet(4, 24),
        scheduler=scheduler,
    )
    pipe = saved(theirs, tmp_path / "theirs")
    rows = dict(padding="max_length", truncation=True, max_length=77)
    ids = theirs.tokenizer(TEXTS, **rows).input_ids
    np.testing.assert_array_equal(pipe.tokenize(TEXTS), ids)
    with torch.no_grad():
        tokens = theirs.bert(torch.tensor(ids))[0]
    cond = pipe.encode_text(TEXTS)
    assert usual.error(np.asarray(cond.tokens), tokens.numpy()) < 1e-4
    z = random(2, 8, 8, 4)
    shown = []
    for guidance in (1.0, 6.0):
        expected = theirs(TEXTS, latents=first(z), guidance_scale=guidance, **STEPS).images
        close(pipe.text_to_image(TEXTS, steps=10, guidance=guidance, latents=z), expected)
        shown.append(expected)
    assert np.abs(shown[0] - shown[1]).max() > 0.02  # the text matters
    with pytest.raises(ValueError, match="reads \\['tokens'\\]"):
        pipe.unconditional()
    with pytest.raises(ValueError, match="text encoders of CLIP"):
        pipe.reading(weighted=True)
    head = ("to_logits.weight", "to_logits.bias")
    names = ("vqvae", "unet", "bert")
    again = the_same_again(pipe, theirs, tmp_path / "ours", names, lost=head)
    assert again.tokenizer(TEXTS, **rows).input_ids == ids


@pytest.mark.parametrize("files", ["vocab.txt", "tokenizer.json"])
@pytest.mark.parametrize("config", [{}, dict(do_lower_case=False), dict(strip_accents=False)])
def test_the_tokenizer_of_bert(files, config, tmp_path):
    theirs = transformers.BertTokenizer.from_pretrained(bert_files.write(tmp_path / "a", **config))
    ours = prompts.load(tmp_path / "a")
    if files == "tokenizer.json":
        theirs.save_pretrained(tmp_path / "b")
        assert not (tmp_path / "b" / "vocab.txt").exists()
        ours = prompts.load(tmp_path / "b")
    rng = python_random.Random(0)
    odd = [
        *"\x00\x1c\x85\xa0\xad\u0301\u200b\u2028\u3000\ufffd\ufb01\u0130ẞé日本ßñΑ()[]'#",
        "\U0001f600",
    ]
    plain = [*" \t\nabcdeABC012.,!", *bert_files.SPECIAL, "the ", "cats", "painted "]
    texts = ["".join(rng.choices(odd + plain, k=rng.randrange(40))) for _ in range(300)]
    texts += ["", " ", "cat " * 90, "x" * 101, *TEXTS]
    rows = dict(padding="max_length", truncation=True, max_length=77)
    expected = np.array(theirs(texts, **rows).input_ids)
    assert len(np.unique(expected)) > 40
    np.testing.assert_array_equal(ours(texts), expected)


def vision(projection=24):
    config = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        projection_dim=projection,
    )
    return weights.randomised(transformers.CLIPVisionModelWithProjection(config))


def seen(x):
    """Images as an image encoder of 32 pixels reads them."""
    return first(clip.prepared(jnp.asarray(x), 32))


def processor():
    return transformers.CLIPImageProcessor(size=dict(shortest_edge=32), crop_size=32)


def test_image_variation(tmp_path):
    theirs = diffusers.StableDiffusionImageVariationPipeline(
        vae=usual.vae(),
        image_encoder=vision(),
        unet=usual.unet(4, 24),
        scheduler=diffusers.DDIMScheduler(**usual.NOISE),
        safety_checker=None,
        feature_extractor=processor(),
        requires_safety_checker=False,
    )
    pipe = saved(theirs, tmp_path / "theirs")
    x, z = np.clip(random(2, 40, 50, 3), -1, 1), random(2, 8, 8, 4, seed=1)
    with torch.no_grad():
        embeds = theirs.image_encoder(seen(x)).image_embeds
    assert usual.error(np.asarray(pipe.encode_image(x)), embeds.numpy()) < 1e-4
    given = dict(image=seen(x), latents=first(z), height=16, width=16)
    for guidance in (1.0, 7.5):
        expected = theirs(**given, guidance_scale=guidance, **STEPS).images
        close(pipe.variations(x, steps=10, guidance=guidance, latents=z), expected)
    with pytest.raises(ValueError, match="reads nothing but the images"):
        pipe.variations(x, "a cat")
    with pytest.raises(ValueError, match="a model for variations"):
        pipe.text_to_image("a cat")
    with pytest.raises(ValueError, match="no place for its image encoder"):
        pipe.save_pretrained(tmp_path / "one.safetensors", layout="original")
    again = the_same_again(pipe, theirs, tmp_path / "ours", ("vae", "unet", "image_encoder"))
    assert again.feature_extractor.to_dict() == theirs.feature_extractor.to_dict()


def test_stable_unclip(tmp_path):
    normalizer = StableUnCLIPImageNormalizer(24)
    normalizer.mean.data.copy_(torch.randn(1, 24, generator=torch.Generator().manual_seed(0)))
    normalizer.std.data.copy_(torch.linspace(0.5, 2, 24)[None])
    given = usual.parts(tmp_path, prediction_type="v_prediction")
    given["unet"] = usual.unet(
        4, class_embed_type="projection", projection_class_embeddings_input_dim=48
    )
    theirs = diffusers.StableUnCLIPImg2ImgPipeline(
        **given,
        image_encoder=vision(),
        feature_extractor=processor(),
        image_normalizer=normalizer,
        image_noising_scheduler=diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    )
    pipe = saved(theirs, tmp_path / "theirs")
    x, z = np.clip(random(2, 40, 50, 3), -1, 1), random(2, 8, 8, 4, seed=1)
    noise = torch.randn(2, 24, generator=torch.Generator().manual_seed(7)).numpy()
    for level, negative in ((0, None), (300, "a dog")):
        expected = theirs(
            image=seen(x),
            prompt=usual.PROMPTS,
            negative_prompt=negative and [negative] * 2,
            noise_level=level,
            guidance_scale=10.0,
            generator=torch.Generator().manual_seed(7),
            latents=first(z),
            height=16,
            width=16,
            **STEPS,
        ).images
        images = pipe.variations(
            x,
            usual.PROMPTS,
            negative,
            noise_level=level,
            noise=noise,
            steps=10,
            guidance=10.0,
            latents=z,
        )
        close(images, expected)
    # Without words, and with noise of the seeds: other pictures for other levels.
    drawn = [pipe.variations(x, steps=10, latents=z, noise_level=level) for level in (0, 900)]
    assert np.abs(drawn[0] - drawn[1]).max() > 0.01
    with pytest.raises(ValueError, match="noise_level=1000 is outside of 0 to 999"):
        pipe.variations(x, noise_level=1000)
    with pytest.raises(ValueError, match="a model for variations"):
        pipe.text_to_image("a cat")
    names = ("vae", "unet", "text_encoder", "image_encoder", "image_normalizer")
    again = the_same_again(pipe, theirs, tmp_path / "ours", names)
    assert again.image_noising_scheduler.config.beta_schedule == "squaredcos_cap_v2"


def tiny(**settings):
    widths = dict(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8))
    blocks = dict(num_encoder_blocks=(1, 2), num_decoder_blocks=(2, 1))
    vae = weights.randomised(diffusers.AutoencoderTiny(**widths, **blocks, **settings))
    last = vae.decoder.layers[-1]
    last.weight.data.mul_(0.1)
    last.bias.data.fill_(0.5)  # in the middle of what is not clipped
    return vae


def test_other_autoencoders(tmp_path):
    """A tiny one and one with another scale, in the folder or in place of the folder's."""
    theirs = usual.stable_diffusion(tmp_path)
    pipe = ldm_jax.from_pretrained(tmp_path / "theirs")
    z, x = random(2, 8, 8, 4), np.clip(random(2, 16, 16, 3), -1, 1)
    for name, vae in (("other", usual.vae(scaling_factor=0.4)), ("tiny", tiny())):
        vae.save_pretrained(tmp_path / name)
        theirs.register_modules(vae=vae)
        with torch.no_grad():
            expected = vae.decode(first(z) / vae.config.scaling_factor).sample
        with_it = pipe.with_autoencoder(tmp_path / name)
        for ours in (with_it, saved(theirs, tmp_path / f"with_{name}")):
            assert weights.relative_error(ours.decode(z), expected) < 1e-4
            with torch.no_grad():
                mean = vae.encode(first(x))
            mean = mean.latents if name == "tiny" else mean.latent_dist.mean
            mean = mean * vae.config.scaling_factor
            assert weights.relative_error(np.asarray(ours.encode(x)), mean) < 1e-4
        again = the_same_again(with_it, theirs, tmp_path / f"ours_{name}", ("vae", "unet"))
        assert type(again.vae) is type(vae)
    expected = theirs(usual.PROMPTS, latents=first(z), height=16, width=16, **STEPS).images
    close(with_it.text_to_image(usual.PROMPTS, steps=10, latents=z), expected)
    tiny(latent_channels=3).save_pretrained(tmp_path / "three")
    with pytest.raises(ValueError, match="latents of 3 channels and this model's have 4"):
        pipe.with_autoencoder(tmp_path / "three")
    with pytest.raises(ValueError, match="holds a UNet2DConditionModel"):
        pipe.with_autoencoder(tmp_path / "theirs" / "unet")


def test_super_resolution(tmp_path):
    """Their pipeline does not scale latents, whatever the autoencoder's config says."""
    torch.manual_seed(0)
    network = weights.randomised(
        diffusers.UNet2DModel.from_config(dict(plain_unet().config) | dict(in_channels=6))
    )
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.0015, beta_end=0.0155, clip_sample=False
    )
    theirs = diffusers.LDMSuperResolutionPipeline(vqvae(scaling_factor=0.7), network, scheduler)
    pipe = saved(theirs, tmp_path / "theirs")
    small = np.clip(random(2, 8, 8, 3), -1, 1)
    generator = torch.Generator().manual_seed(3)
    expected = theirs(
        first(small), batch_size=2, num_inference_steps=10, generator=generator, output_type="np"
    ).images
    z = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    images = pipe.super_resolution(small, steps=10, latents=z.permute(0, 2, 3, 1).numpy())
    close(images, expected)
    the_same_again(pipe, theirs, tmp_path / "ours", ("vqvae", "unet"))
