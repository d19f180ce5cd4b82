"""Guidance against diffusers' own functions: perturbed and blurred attention, projection, CFG-Zero*, thresholding."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion import blurring, finishes, guidance, paths, process, targets
from ldm_jax.nn import taps
from ldm_jax.types import Cond, Prediction
from ldm_jax.weights import unet as their
from tests.parity import weights
from tests.parity.test_unet_weights import CASES

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.parity

STEP = 731
RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 8, 12, 4)).astype(np.float32)
TOKENS, EMPTY = RNG.standard_normal((2, 2, 7, 10)).astype(np.float32)


def first(x):
    return torch.from_numpy(np.moveaxis(np.asarray(x), -1, 1).copy())


@pytest.fixture(scope="module")
def networks():
    """Stable Diffusion 1 in small: diffusers' network, and ours as a function."""
    config = CASES["Stable Diffusion 1"]
    torch.manual_seed(0)
    theirs = weights.randomised(diffusers.UNet2DConditionModel.from_config(config))
    module = their.from_config(dict(theirs.config))
    shapes = jax.eval_shape(module.init, jax.random.key(0), *their.example(config))["params"]
    params = weights.copied(theirs, shapes, their.table_of(config))
    return theirs, lambda *args: module.apply({"params": params}, *args)


def test_perturbed_attention(networks):
    from diffusers.pipelines.pag.pag_utils import PAGMixin

    theirs, network = networks
    for layer, block in (("mid", "mid"), ("down_blocks.(0|1)", "down_.")):
        pipe = PAGMixin()
        pipe.unet = theirs
        plain = theirs.attn_processors
        pipe.set_pag_applied_layers(layer)
        pipe._set_pag_attn_processor(pipe.pag_applied_layers, False)
        with torch.no_grad():
            both = [torch.cat([a] * 2) for a in (first(X), torch.from_numpy(TOKENS))]
            reference = theirs(both[0], STEP, encoder_hidden_states=both[1]).sample
        theirs.set_attn_processor(plain)
        t, cond = jnp.full(2, float(STEP)), Cond(tokens=jnp.asarray(TOKENS))
        got = jax.jit(taps.with_identity(network, (block,)))(X, t, cond)
        errors = [weights.relative_error(got, half) for half in reference.chunk(2)]
        print(f"{block}: {errors[1]:.1e}, unperturbed {errors[0]:.1e}")
        assert errors[1] < 1e-5 < 1e-3 < errors[0]


def test_self_attention_guidance(networks):
    from diffusers.pipelines.deprecated.stable_diffusion_sag import pipeline_stable_diffusion_sag

    theirs, network = networks
    scheduler = diffusers.DDIMScheduler(1000, 0.00085, 0.012, "scaled_linear")
    of = pipeline_stable_diffusion_sag.StableDiffusionSAGPipeline
    pipe = types.SimpleNamespace(unet=theirs, scheduler=scheduler)
    store, plain = pipeline_stable_diffusion_sag.CrossAttnStoreProcessor(), theirs.attn_processors
    theirs.mid_block.attentions[0].transformer_blocks[0].attn1.processor = store
    x, tokens, t = first(X), torch.from_numpy(np.concatenate([EMPTY, TOKENS])), torch.tensor(STEP)
    with torch.no_grad():
        null, text = theirs(torch.cat([x, x]), t, encoder_hidden_states=tokens).sample.chunk(2)
        attention = store.attention_probs.chunk(2)[0]
        x0, eps = of.pred_x0(pipe, x, null, t), of.pred_epsilon(pipe, x, null, t)
        blurred = of.sag_masking(pipe, x0, attention, (2, 3), t, eps)
        worse = theirs(blurred, t, encoder_hidden_states=tokens[:2]).sample
        reference = null + 4.0 * (text - null) + 0.75 * (null - worse)
    theirs.set_attn_processor(plain)
    assert 0.05 < float((blurred != x).float().mean()) < 1

    path, tapped = paths.ddpm("scaled_linear"), taps.with_maps(network, False, ("mid",))

    def look(*args):
        found = []

        def inner(*args):
            out, maps = tapped(*args)
            found.extend(maps.values())
            return out

        prediction = process.make_denoiser(inner, path, targets.eps())(*args)
        return prediction, taps.received(found[0])

    made = blurring.sag(look, path, 0.75, Cond(tokens=jnp.asarray(EMPTY)), 4.0)
    got = jax.jit(made)(X, jnp.full(2, STEP / 999), Cond(tokens=jnp.asarray(TOKENS)))
    error = weights.relative_error(got.eps, reference)
    print(f"{error:.1e}")
    assert error < 1e-5


def test_projection_zero_star_and_thresholding():
    from diffusers.guiders import adaptive_projected_guidance, classifier_free_zero_star_guidance

    path, t = paths.rectified_flow(), jnp.array([0.4, 0.7])
    positive, negative = (
        Prediction(
            jnp.asarray(x0), (X - (1 - t)[:, None, None, None] * x0) / t[:, None, None, None]
        )
        for x0 in 3 * RNG.standard_normal((2, *X.shape)).astype(np.float32)
    )
    w = 5.0
    out = guidance.combine((w, 1 - w), (positive, negative))
    parts = finishes.Parts(jnp.asarray(X), t, Cond(), jnp.float32(w), positive, negative, out)
    c, u = torch.from_numpy(np.array(positive.x0)), torch.from_numpy(np.array(negative.x0))
    for eta, radius in ((0.0, 15.0), (0.5, 1e6)):
        project = adaptive_projected_guidance.normalized_guidance
        want = project(c, u, w - 1, None, eta, radius, use_original_formulation=True)
        got = finishes.apg(path, eta, radius)(parts).x0
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)

    v, null = (torch.from_numpy(np.array(p.eps - p.x0)) for p in (positive, negative))
    star = classifier_free_zero_star_guidance.ClassifierFreeZeroStarGuidance(w, zero_init_steps=0)
    star.set_state(0, 10, torch.tensor(700))
    got = finishes.zero_star(path)(parts)
    np.testing.assert_allclose(got.eps - got.x0, star.forward(v, null).pred, rtol=1e-4, atol=1e-3)

    for ratio, most in ((0.9, 100.0), (0.995, 1.5)):
        scheduler = diffusers.DDIMScheduler(
            thresholding=True, dynamic_thresholding_ratio=ratio, sample_max_value=most
        )
        want = scheduler._threshold_sample(c)
        got = finishes.threshold(path, ratio, 1.0, most)(parts._replace(out=positive)).x0
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
