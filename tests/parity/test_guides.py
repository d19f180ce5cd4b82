"""Guidance of pretrained models against diffusers' pipelines, and CLIP as a judge against transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ldm_jax
from ldm_jax import towards
from ldm_jax.models import clip
from ldm_jax.pretrained.inputs import Hint
from tests.parity import weights
from tests.parity.pipelines import CHECKER, PROMPTS, close, first, parts, random

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.parity


def test_perturbed_attention(tmp_path):
    of = parts(tmp_path)
    diffusers.StableDiffusionPipeline(**of, **CHECKER).save_pretrained(tmp_path / "theirs")
    pipe = ldm_jax.from_pretrained(tmp_path / "theirs")
    theirs = diffusers.StableDiffusionPAGPipeline(**of, **CHECKER, pag_applied_layers="mid")
    theirs.set_progress_bar_config(disable=True)
    z = random(2, 8, 8, 4)
    given = dict(num_inference_steps=10, latents=first(z), height=16, width=16, output_type="np")
    expected = theirs(PROMPTS, guidance_scale=7.5, pag_scale=3.0, **given).images
    ours = dict(steps=10, guidance=7.5, latents=z)
    plain = pipe.text_to_image(PROMPTS, **ours) / 2 + 0.5
    assert np.abs(np.clip(plain, 0, 1) - expected).max() > 0.01
    close(pipe.guiding("pag", strength=3.0).text_to_image(PROMPTS, **ours), expected)


def test_perturbed_attention_beside_a_controlnet(tmp_path):
    of = parts(tmp_path)
    fresh = diffusers.ControlNetModel.from_unet(
        of["unet"], conditioning_embedding_out_channels=(4, 8)
    )
    net = weights.randomised(fresh)
    theirs = diffusers.StableDiffusionControlNetPAGPipeline(
        **of, **CHECKER, controlnet=net, pag_applied_layers="mid"
    )
    theirs.set_progress_bar_config(disable=True)
    diffusers.StableDiffusionPipeline(**of, **CHECKER).save_pretrained(tmp_path / "theirs")
    net.save_pretrained(tmp_path / "net")
    pipe = ldm_jax.from_pretrained(tmp_path / "theirs", controlnets=[tmp_path / "net"])
    z = random(2, 8, 8, 4)
    hint = np.random.default_rng(3).uniform(0, 1, (2, 16, 16, 3)).astype(np.float32)
    given = dict(num_inference_steps=5, latents=first(z), height=16, width=16, output_type="np")
    expected = theirs(PROMPTS, first(hint), guidance_scale=7.5, pag_scale=3.0, **given).images
    ours = dict(steps=5, guidance=7.5, latents=z, hints=[Hint(hint)])
    plain = pipe.text_to_image(PROMPTS, **ours) / 2 + 0.5
    assert np.abs(np.clip(plain, 0, 1) - expected).max() > 0.01
    close(pipe.guiding("pag", strength=3.0).text_to_image(PROMPTS, **ours), expected)


def test_clip_judges_as_theirs_does(clip_model):
    """The value, and its gradient by pictures of CLIP's own size, which are not resized."""
    folder, tokenizer, network = clip_model
    judge = towards.load(folder)
    x = np.random.default_rng(0).uniform(-1, 1, (2, 24, 24, 3)).astype(np.float32)
    texts = ["a painting of a horse", "three cats by the sea"]
    wanted = jnp.asarray(judge.wanted(texts))

    def value(x):
        return judge.log_p(judge.params, wanted, x, jnp.zeros(2)).sum()

    found, grad = jax.value_and_grad(value)(jnp.asarray(x))
    pixels = torch.from_numpy(x).requires_grad_(True)
    mean, std = torch.tensor(clip.MEAN), torch.tensor(clip.STD)
    seen = (((pixels + 1) / 2 - mean) / std).permute(0, 3, 1, 2)
    ids = tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt").input_ids
    out = network(input_ids=ids, pixel_values=seen)
    theirs = 100 * (out.image_embeds * out.text_embeds).sum()
    theirs.backward()
    assert float(found) == pytest.approx(theirs.item(), abs=1e-2)
    expected = pixels.grad.numpy()
    assert np.linalg.norm(grad - expected) < 1e-3 * np.linalg.norm(expected)
