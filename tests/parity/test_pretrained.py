"""Whole folders of diffusers' pipelines: loaded, used and written back, against diffusers itself."""

import jax
import numpy as np
import pytest

import ldm_jax
from ldm_jax.pretrained.inputs import Hint
from tests.parity import weights
from tests.parity.pipelines import (
    CHECKER,
    NOISE,
    PROMPTS,
    close,
    error,
    first,
    parts,
    random,
    shown,
    stable_diffusion,
    text_encoder,
    tokenizer,
    unet,
    vae,
)

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.parity


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


def test_image_to_image(tmp_path):
    theirs = stable_diffusion(tmp_path, diffusers.StableDiffusionImg2ImgPipeline)
    pipe = ldm_jax.from_pretrained(tmp_path / "theirs")
    x = np.clip(random(2, 16, 16, 3), -1, 1)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    z = noise.permute(0, 2, 3, 1).numpy()
    for strength, negative in ((0.5, None), (0.85, "a dog"), (1.0, None)):
        # Latents in place of images: of those theirs would draw from the posterior, and we take the mean.
        expected = theirs(
            PROMPTS,
            image=first(pipe.encode(x)),
            negative_prompt=negative and [negative] * 2,
            strength=strength,
            num_inference_steps=10,
            generator=torch.Generator().manual_seed(5),
            output_type="np",
        ).images
        images = pipe.image_to_image(PROMPTS, x, negative, steps=10, strength=strength, latents=z)
        print("largest difference", np.abs(np.clip(images / 2 + 0.5, 0, 1) - expected).max())
        close(images, expected)


def test_inpaint(tmp_path):
    theirs = stable_diffusion(tmp_path, diffusers.StableDiffusionInpaintPipeline, 9)
    pipe = ldm_jax.from_pretrained(tmp_path / "theirs")
    x, z = np.clip(random(2, 16, 16, 3), -1, 1), random(2, 8, 8, 4, seed=1)
    mask = (random(2, 16, 16, seed=2) > 0).astype(np.float32)
    # Theirs draws from the posterior; given as latents, the mean is what both see.
    masked = pipe.encode(np.where(mask[..., None] > 0, 0, x).astype(np.float32))
    expected = theirs(
        PROMPTS,
        image=shown(x),
        mask_image=torch.from_numpy(mask)[:, None],
        masked_image_latents=first(masked),
        num_inference_steps=10,
        latents=first(z),
        height=16,
        width=16,
        output_type="np",
    ).images
    close(pipe.inpaint(PROMPTS, x, mask, steps=10, latents=z, exact=False), expected)
    with pytest.raises(ValueError, match="it is a model for inpaint"):
        pipe.text_to_image(PROMPTS)


def test_instruct(tmp_path):
    theirs = stable_diffusion(tmp_path, diffusers.StableDiffusionInstructPix2PixPipeline, 8)
    pipe = ldm_jax.from_pretrained(tmp_path / "theirs")
    x, z = np.clip(random(2, 16, 16, 3), -1, 1), random(2, 8, 8, 4, seed=1)
    expected = theirs(
        PROMPTS,
        image=shown(x),
        num_inference_steps=10,
        guidance_scale=7.5,
        image_guidance_scale=1.5,
        latents=first(z),
        output_type="np",
    ).images
    close(pipe.instruct(PROMPTS, x, steps=10, latents=z), expected)


def test_depth_to_image(tmp_path):
    """Through image_to_image's start: theirs noises with its own generator, so the start is compared by hand."""
    given = parts(tmp_path, 5)
    theirs = diffusers.StableDiffusionPipeline(**given, **CHECKER)
    theirs.save_pretrained(tmp_path / "theirs")
    pipe = ldm_jax.from_pretrained(tmp_path / "theirs")
    x, z = np.clip(random(2, 16, 16, 3), -1, 1), random(2, 8, 8, 4, seed=1)
    depth = random(2, 8, 8, seed=2)
    scheduler, steps, strength = given["scheduler"], 10, 0.6
    scheduler.set_timesteps(steps)
    times = scheduler.timesteps[steps - int(steps * strength) :]
    with torch.no_grad():
        mean = theirs.vae.encode(first(x)).latent_dist.mean * theirs.vae.config.scaling_factor
        walk = scheduler.add_noise(mean, first(z), times[:1])
        tokens = [
            theirs.text_encoder(
                torch.tensor(theirs.tokenizer(t, padding="max_length", max_length=77).input_ids)
            )[0]
            for t in ([""] * 2, PROMPTS)
        ]
        low, high = (getattr(depth, f)((1, 2), keepdims=True) for f in ("min", "max"))
        plane = first((2 * (depth - low) / (high - low) - 1)[..., None].astype(np.float32))
        for t in times:
            away, out = (
                theirs.unet(torch.cat([walk, plane], 1), t, tokens[i]).sample for i in (0, 1)
            )
            walk = scheduler.step(away + 7.5 * (out - away), t, walk).prev_sample
        expected = theirs.vae.decode(walk / theirs.vae.config.scaling_factor).sample
    expected = (expected / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    images = pipe.depth_to_image(PROMPTS, x, depth, strength=strength, steps=steps, latents=z)
    close(images, expected)


def test_upscale(tmp_path):
    given = parts(tmp_path, prediction_type="v_prediction")
    given["unet"] = unet(7, num_class_embeds=1000)
    low = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    theirs = diffusers.StableDiffusionUpscalePipeline(
        **given, low_res_scheduler=low, safety_checker=None, feature_extractor=None
    )
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained(tmp_path / "theirs")
    pipe = ldm_jax.from_pretrained(tmp_path / "theirs")
    x, z = np.clip(random(2, 8, 8, 3), -1, 1), random(2, 8, 8, 4, seed=1)
    torch.manual_seed(5)
    noise = torch.randn(2, 3, 8, 8)
    generator = torch.Generator().manual_seed(5)
    expected = theirs(
        PROMPTS,
        image=shown(x),
        num_inference_steps=10,
        guidance_scale=9.0,
        noise_level=20,
        latents=first(z),
        generator=generator,
        output_type="np",
    ).images
    images = pipe.upscale(PROMPTS, x, steps=10, latents=z, noise=noise.permute(0, 2, 3, 1).numpy())
    close(images, expected)


def same_state(ours, theirs):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_controlnets(tmp_path):
    given = parts(tmp_path)
    nets = [
        weights.randomised(
            diffusers.ControlNetModel(
                block_out_channels=(16, 32),
                layers_per_block=1,
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                attention_head_dim=2,
                cross_attention_dim=32,
                norm_num_groups=8,
                conditioning_embedding_out_channels=(8, 16),
            ),
            seed,
        )
        for seed in (1, 2)
    ]
    theirs = diffusers.StableDiffusionControlNetPipeline(**given, controlnet=nets, **CHECKER)
    theirs.set_progress_bar_config(disable=True)
    diffusers.StableDiffusionPipeline(**given, **CHECKER).save_pretrained(tmp_path / "theirs")
    theirs.save_pretrained(tmp_path / "steered")
    folders = [tmp_path / "first", tmp_path / "second"]
    for net, folder in zip(nets, folders, strict=True):
        net.save_pretrained(folder)
    pipe = ldm_jax.from_pretrained(tmp_path / "theirs", controlnets=folders)
    rng = np.random.default_rng(0)
    images = [rng.random((2, 16, 16, 3)).astype(np.float32) for _ in nets]
    z = random(2, 8, 8, 4, seed=1)
    hints = [Hint(images[0], 0.7), Hint(images[1], 0.4, 0.2, 0.8)]
    expected = theirs(
        PROMPTS,
        image=[first(x) for x in images],
        num_inference_steps=10,
        latents=first(z),
        controlnet_conditioning_scale=[0.7, 0.4],
        control_guidance_start=[0.0, 0.2],
        control_guidance_end=[1.0, 0.8],
        height=16,
        width=16,
        output_type="np",
    ).images
    close(pipe.text_to_image(PROMPTS, steps=10, latents=z, hints=hints), expected)
    # Both write a folder with its ControlNets, and both read it.
    own = ldm_jax.from_pretrained(tmp_path / "steered")
    jax.tree.map(np.testing.assert_array_equal, own.params, pipe.params)
    pipe.save_pretrained(tmp_path / "ours")
    again = diffusers.StableDiffusionControlNetPipeline.from_pretrained(tmp_path / "ours")
    for ours, net in zip(again.controlnet.nets, nets, strict=True):
        same_state(ours, net)
    one = ldm_jax.from_pretrained(tmp_path / "theirs", controlnets=folders[:1])
    one.save_pretrained(tmp_path / "one")
    again = diffusers.StableDiffusionControlNetPipeline.from_pretrained(tmp_path / "one")
    same_state(again.controlnet, nets[0])
    with pytest.raises(ValueError, match="0 hints for 2 ControlNets"):
        pipe.text_to_image(PROMPTS, steps=10, latents=z)


XL = dict(
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    transformer_layers_per_block=(1, 2),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    use_linear_projection=True,
)


def test_xl_and_its_refiner(tmp_path):
    words = tokenizer(tmp_path / "words")
    second = tokenizer(tmp_path / "words_2", pad="!")
    common = dict(vae=vae(scaling_factor=0.13025), scheduler=diffusers.DDIMScheduler(**NOISE))
    one, two = text_encoder(len(words)), text_encoder(len(words), 24, "gelu", 20)
    base = diffusers.StableDiffusionXLPipeline(
        **common,
        text_encoder=one,
        text_encoder_2=two,
        tokenizer=words,
        tokenizer_2=second,
        unet=unet(4, 56, projection_class_embeddings_input_dim=20 + 6 * 256, **XL),
        add_watermarker=False,
    )
    refiner = diffusers.StableDiffusionXLImg2ImgPipeline(
        **common,
        text_encoder=None,
        text_encoder_2=two,
        tokenizer=None,
        tokenizer_2=second,
        unet=unet(4, 24, projection_class_embeddings_input_dim=20 + 5 * 256, **XL),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
    z = random(2, 8, 8, 4)
    for name, theirs in (("base", base), ("refiner", refiner)):
        theirs.set_progress_bar_config(disable=True)
        theirs.save_pretrained(tmp_path / name)
    pipe = ldm_jax.from_pretrained(tmp_path / "base")
    assert len(pipe.tokenize(PROMPTS)) == 2
    for negative in (None, "a dog"):
        expected = base(
            PROMPTS,
            negative_prompt=negative and [negative] * 2,
            num_inference_steps=10,
            guidance_scale=5.0,
            latents=first(z),
            height=16,
            width=16,
            original_size=(40, 30),
            crops_coords_top_left=(3, 5),
            output_type="np",
        ).images
        images = pipe.text_to_image(
            PROMPTS,
            negative,
            steps=10,
            guidance=5.0,
            latents=z,
            original_size=(40, 30),
            crop=(3, 5),
        )
        close(images, expected)
    pipe = ldm_jax.from_pretrained(tmp_path / "refiner")
    # Latents in place of images: theirs takes them as they are, and noises by its generator.
    x = np.clip(random(2, 16, 16, 3), -1, 1)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    expected = refiner(
        PROMPTS,
        image=first(pipe.encode(x)),
        strength=0.5,
        num_inference_steps=10,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(5),
        output_type="np",
    ).images
    images = pipe.image_to_image(
        PROMPTS, x, steps=10, strength=0.5, guidance=5.0, latents=noise.permute(0, 2, 3, 1).numpy()
    )
    close(images, expected)
