"""Bits per dimension of models whose density is known, and of trained ones by the command."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import codec
from ldm_jax.diffusion import paths
from ldm_jax.pipeline import Pipeline
from ldm_jax.quality import likelihood, pictures
from ldm_jax.training import sharding
from tests import tiny
from tests.exact import NO_COND, gaussian
from tests.tiny import quick_compiles  # noqa: F401 (a fixture of this module)

SIZE = (8, 8, 3)
WIDTH = 0.25  # the pictures are N(0, WIDTH^2)
NOISE, SCALE = 2.0**-5, 3.0  # of latents
LEVELS = np.log2(127.5)  # bits of a value of 256 levels in [-1, 1], for a density of 1


def entropy(std):
    return 0.5 * np.log2(2 * np.pi * np.e * std**2)


class Exact(Pipeline):
    """A model that knows the distribution of its latents, normal with this standard deviation."""

    def __init__(self, coder, std, arrays, path):
        denoise = gaussian(path, np.zeros(3, np.float32), np.eye(3, dtype=np.float32) * std**2)
        model = SimpleNamespace(
            path=path,
            codec=coder,
            condition=lambda params, batch: NO_COND,
            seen=lambda arrays, batch, key: batch,
            denoiser=lambda params: denoise,
        )
        values = dict(model=model, arrays=arrays, params={}, shape=SIZE)
        for name, value in (values | dict(mesh=sharding.make_mesh())).items():
            object.__setattr__(self, name, value)


def drawn(n=60):
    x = np.random.default_rng(0).normal(size=(n, *SIZE)) * WIDTH
    x *= WIDTH / x.std()  # the sample's own variance would be most of the error
    return pictures.of_array("normal", np.rint((x + 1) * 127.5).clip(0, 255).astype(np.uint8))


def bits(of, steps=None):
    given = ({"_": np.zeros(60, np.int32)}, likelihood.levels(of, steps), 0, 32)
    return likelihood.figures(of, drawn(), *given)


@pytest.mark.parametrize(
    ("path", "within"), [(paths.rectified_flow(), 0.06), (paths.ddpm("linear", 1e-4, 0.02), 0.7)]
)
def test_bits_of_pixels_are_just_above_their_entropy(path, within):
    """The levels of DDPM's table lie far apart at the clean end."""
    of = Exact(codec.identity(), WIDTH, {}, path)
    found = bits(of)
    assert entropy(WIDTH) + LEVELS < found["bpd"] < entropy(WIDTH) + LEVELS + within
    parts = found["bpd_prior"] + found["bpd_transitions"] + found["bpd_decoder"]
    assert found["bpd"] == pytest.approx(parts)
    if path.steps is None:
        assert bits(of, 20)["bpd"] > found["bpd"] + 0.1  # a coarser bound is a looser one
    wide = Exact(codec.identity(), 3 * WIDTH, {}, path)
    assert bits(wide)["bpd"] > found["bpd"] + 0.3


def posterior(noise=NOISE):
    """Pictures with noise, scaled: a codec whose every term is known."""

    def moments(arrays, x):
        return jnp.concatenate([x, jnp.full_like(x, 2 * np.log(noise))], -1)

    def encode(arrays, x, rng):
        return (x + noise * jax.random.normal(rng, x.shape)) * arrays["scale"]

    return codec.Codec(encode, lambda arrays, z: z / arrays["scale"], lambda shape: shape, moments)


def test_bits_of_latents_are_those_of_both_stages():
    """The decoder's density at its best is the posterior's, so that the latents' entropy is left."""
    std = np.hypot(WIDTH, NOISE)
    found = bits(
        Exact(posterior(), SCALE * std, {"scale": jnp.float32(SCALE)}, paths.cosine()), 400
    )
    assert found["decoder_std"] == NOISE
    assert found["bpd_decoder"] == pytest.approx(entropy(NOISE) + LEVELS, abs=0.03)
    assert entropy(std) + LEVELS < found["bpd"] < entropy(std) + LEVELS + 0.2
    assert found["bpd"] == pytest.approx(found["bpd_latents"] + found["bpd_decoder"])


def test_codes_have_no_density():
    codes = posterior()._replace(moments=lambda arrays, x: x)
    for coder in (codes, codes._replace(moments=None, encode=lambda a, x, r: x[:, ::2, ::2])):
        of = Exact(coder, WIDTH, {"scale": jnp.float32(1.0)}, paths.cosine())
        with pytest.raises(ValueError, match="those of this model are codes; leave bpd out"):
            likelihood.check(of)
    with pytest.raises(ValueError, match="at least two steps, not 1"):
        likelihood.levels(Exact(codec.identity(), WIDTH, {}, paths.cosine()), 1)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "parts"), [("pixels", 3), ("text", 2)])
def test_the_command_tells_bits_per_dimension(kind, parts, tmp_path):
    out = tmp_path / "out.json"
    argv = ["--workdir", tiny.shared_model(kind), "--metrics", "bpd", "--bpd_steps", 4]
    assert tiny.call("ldm_jax/evaluate", *argv, "--n", 10, "--out", out) == 0
    found = json.loads(out.read_text())
    told = [value for name, value in found.items() if name.startswith("bpd_")]
    assert len(told) == parts
    assert found["bpd"] == pytest.approx(sum(told), rel=1e-5)
    assert found["bpd"] > 4  # of a model that has learnt nothing
