"""Edits against diffusers: blending, RePaint, DDIM inversion, the masks of DiffEdit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ldm_jax
from ldm_jax.diffusion import diffedit, inpainting, inversion, paths, samplers, solvers
from ldm_jax.diffusion.process import Point
from ldm_jax.pretrained import edits, inputs
from ldm_jax.types import Cond, Prediction
from tests.parity.pipelines import PROMPTS, close, first, random, shown, stable_diffusion

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.parity

TABLE = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
PATH = paths.ddpm()


def last(x):
    return np.asarray(x.permute(0, 2, 3, 1))


def test_blending_of_a_model_that_was_not_trained_to_inpaint(tmp_path):
    theirs = stable_diffusion(tmp_path, diffusers.StableDiffusionInpaintPipeline, 4)
    pipe = ldm_jax.from_pretrained(tmp_path / "theirs")
    x, z = np.clip(random(2, 16, 16, 3), -1, 1), random(2, 8, 8, 4, seed=1)
    mask = (random(2, 16, 16, seed=2) > 0).astype(np.float32)
    known = first(pipe.encode(x))  # theirs draws from the posterior
    theirs._encode_vae_image = lambda image, generator: known
    expected = theirs(
        PROMPTS,
        image=shown(x),
        mask_image=torch.from_numpy(mask)[:, None],
        num_inference_steps=10,
        strength=1.0,
        latents=first(z),
        height=16,
        width=16,
        output_type="np",
    ).images
    close(pipe.inpaint(PROMPTS, x, mask, steps=10, latents=z, exact=False), expected)


def test_the_masks_of_diffedit(tmp_path):
    theirs = stable_diffusion(tmp_path)
    pipe = ldm_jax.from_pretrained(tmp_path / "theirs")
    x, maps = np.clip(random(1, 16, 16, 3), -1, 1), random(3, 1, 8, 8, 4, seed=1)
    texts = PROMPTS
    after, before = (inputs.conditions(pipe, [t], None, (16, 16), {}) for t in texts)
    found = edits.find_masks(pipe, after, before, x, 0.5, 10, 7.5, 3, 0, noises=maps)
    scheduler = theirs.scheduler
    scheduler.set_timesteps(10)
    t = scheduler.timesteps[5]
    noisy = scheduler.add_noise(first(pipe.encode(x)).expand(3, -1, -1, -1), first(maps[:, 0]), t)
    with torch.no_grad():
        ids = theirs.tokenizer([*texts, ""], padding="max_length", max_length=77).input_ids
        tokens = theirs.text_encoder(torch.tensor(ids))[0]
        target, source, null = (
            theirs.unet(noisy, t, row[None].expand(3, -1, -1)).sample for row in tokens
        )
    guided = [null + 7.5 * (noise - null) for noise in (target, source)]
    # As StableDiffusionDiffEditPipeline.generate_mask has it.
    contrast = torch.abs(guided[0] - guided[1]).reshape(1, 3, 4, 8, 8).mean([1, 2])
    np.testing.assert_allclose(found[..., 0], contrast, rtol=1e-3, atol=1e-4)
    limit = contrast.mean() * 3.0
    theirs_mask = torch.where(contrast.clamp(0, limit) / limit <= 0.5, 0, 1)
    np.testing.assert_array_equal(diffedit.binarised(found)[..., 0], theirs_mask)


def linear(x, t):
    """A network that both can run."""
    return 0.3 * x * (1 + t / 1000) + 0.1


def denoise(x_t, t, cond):
    alpha, sigma = (f(t)[:, None, None, None] for f in (PATH.alpha, PATH.sigma))
    eps = linear(x_t, (t * 999)[:, None, None, None])
    return Prediction((x_t - sigma * eps) / alpha, eps)


@pytest.mark.parametrize("to_one", [True, False])
def test_ddim_inversion(to_one):
    scheduler = diffusers.DDIMInverseScheduler(
        **TABLE, set_alpha_to_one=to_one, clip_sample=False, steps_offset=1
    )
    scheduler.set_timesteps(10)
    x0 = random(2, 4, 4, 3)
    theirs = first(x0)
    for t in scheduler.timesteps:
        theirs = scheduler.step(linear(theirs, t), t, theirs).prev_sample
    points = samplers.grid(PATH, 10, "leading", to_one, offset=1)
    ours, _ = jax.jit(lambda x: inversion.invert(denoise, points, x, Cond()))(x0)
    assert np.abs(ours - last(theirs)).max() < 1e-4 * np.abs(theirs).max()


def test_repaint():
    """The levels, and a step with the noise given."""
    scheduler = diffusers.RePaintScheduler(
        beta_schedule="linear", beta_start=0.00085, beta_end=0.012, eta=1.0, clip_sample=False
    )
    for steps, jump, times in ((20, 5, 3), (12, 3, 2), (10, 4, 4)):
        scheduler.set_timesteps(steps, jump, times)
        walked = [int(t) // (1000 // steps) for t in scheduler.timesteps] + [-1]
        turns = [
            a
            for i, a in enumerate(walked)
            if i in (0, len(walked) - 1) or not walked[i - 1] < a < walked[i + 1]
        ]
        ours = steps - 1 - inpainting.levels(steps, jump, times)
        assert turns == ours.tolist()
    scheduler.set_timesteps(10, 2, 2)
    path = paths.ddpm("linear", 0.00085, 0.012)
    x, known, z = (random(2, 4, 4, 3, seed=s) for s in range(3))
    mask = (random(2, 4, 4, 1, seed=4) > 0).astype(np.float32)
    times = jnp.array([700, 600]) / 999
    points = Point(times, path.alpha(times), path.sigma(times))
    solver = inpainting.blended(solvers.ddim(1.0), jnp.asarray(known), jnp.asarray(mask))
    ours, _ = samplers.sample(
        lambda x, t, c: _on(path, x, t),
        solver,
        points,
        jnp.asarray(x),
        jnp.asarray(z)[None],
        Cond(),
    )
    torch.manual_seed(0)
    drawn = diffusers.schedulers.scheduling_repaint
    real, drawn.randn_tensor = drawn.randn_tensor, lambda *args, **kwargs: first(z)
    try:
        theirs = scheduler.step(
            linear(first(x), 700), 700, first(x), first(known), first(1 - mask)
        ).prev_sample
    finally:
        drawn.randn_tensor = real
    np.testing.assert_allclose(ours, last(theirs), atol=1e-5)


def _on(path, x, t):
    alpha, sigma = (f(t)[:, None, None, None] for f in (path.alpha, path.sigma))
    eps = linear(x, (t * 999)[:, None, None, None])
    return Prediction((x - sigma * eps) / alpha, eps)
