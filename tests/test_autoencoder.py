"""The KL autoencoder: sizes of the published models, shapes for any number of axes, the Gaussian, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models import autoencoder
from tests.drawn import count, drawn
from tests.jaxprs import remats

NO, YES = False, True
# name, arguments, downsampling factor, the exact number of parameters (CompVis/latent-diffusion)
MODELS = [
    ("kl-f4", dict(mults=(1, 2, 4), z_channels=3, embed=3), 4, 55_312_063),
    ("kl-f8", dict(), 8, 83_653_863),
    (
        "kl-f16",
        dict(mults=(1, 1, 2, 2, 4), z_channels=16, embed=16, attention=(NO, NO, NO, NO, YES)),
        16,
        69_610_963,
    ),
    (
        "kl-f32",
        dict(
            mults=(1, 1, 2, 2, 4, 4), z_channels=64, embed=64, attention=(NO, NO, NO, NO, YES, YES)
        ),
        32,
        103_880_131,
    ),
]
SMALL = dict(width=8, mults=(1, 2), blocks=1, z_channels=3, embed=2, groups=4)
KEY = jax.random.key(0)


@pytest.mark.parametrize(
    ("kwargs", "factor", "expected"), [m[1:] for m in MODELS], ids=[m[0] for m in MODELS]
)
def test_published_models_have_their_exact_number_of_parameters(kwargs, factor, expected):
    model = autoencoder.KLAutoencoder(**kwargs)
    x = jnp.zeros((1, 64, 64, 3))
    (y, posterior), variables = jax.eval_shape(model.init_with_output, KEY, x, KEY)
    assert count(variables["params"]) == expected
    assert model.factor == factor
    assert posterior.mean.shape == (1, 64 // factor, 64 // factor, model.embed)
    assert y.shape == x.shape


@pytest.mark.parametrize("space", [(12,), (8, 12), (4, 8, 6)])
def test_any_number_of_axes(space):
    model = autoencoder.KLAutoencoder(**SMALL, channels=2, attention=(True, True))
    x = jnp.zeros((2, *space, 2))
    (y, posterior), variables = jax.eval_shape(model.init_with_output, KEY, x, KEY)
    assert y.shape == x.shape
    assert posterior.mean.shape == (2, *(n // 2 for n in space), 2)
    assert variables["params"]["decoder"]["conv_out"]["kernel"].shape == (3,) * len(space) + (8, 2)


def test_stride_per_axis_keeps_the_frames_of_a_video():
    model = autoencoder.KLAutoencoder(**SMALL, stride=(1, 2, 2))
    assert model.factor == (1, 2, 2)
    x = jnp.zeros((1, 5, 4, 4, 3))
    (y, posterior), _ = jax.eval_shape(model.init_with_output, KEY, x, KEY)
    assert posterior.mean.shape == (1, 5, 2, 2, 2)
    assert y.shape == x.shape


def test_gaussian_closed_forms():
    mean, logvar = jnp.full((2, 3, 1), 1.5), jnp.full((2, 3, 1), jnp.log(4.0))
    gaussian = autoencoder.Gaussian(mean, logvar)
    # KL(N(m, s²) ‖ N(0, 1)) = (m² + s² - 1 - log s²) / 2 for each of 3 elements
    each = 0.5 * (1.5**2 + 4.0 - 1.0 - np.log(4.0))
    np.testing.assert_allclose(gaussian.kl(), [3 * each] * 2, rtol=1e-6)
    standard = autoencoder.Gaussian(jnp.zeros((1, 5)), jnp.zeros((1, 5)))
    np.testing.assert_array_equal(standard.kl(), [0.0])
    wide = autoencoder.Gaussian(jnp.full((1, 20_000), 1.5), jnp.full((1, 20_000), jnp.log(4.0)))
    draw = wide.sample(KEY)
    np.testing.assert_allclose([draw.mean(), draw.std()], [1.5, 2.0], atol=0.05)


def test_log_variance_is_clipped():
    model = autoencoder.KLAutoencoder(**SMALL)
    x = jnp.zeros((1, 4, 4, 3))
    params = drawn(model, x, KEY)["params"]
    encode = jax.jit(lambda params: model.apply({"params": params}, x, method="encode"))
    for bias, limit in ((1e3, 20.0), (-1e3, -30.0)):
        forced = params | {
            "quant_conv": {"kernel": jnp.zeros((1, 1, 6, 4)), "bias": jnp.full(4, bias)}
        }
        posterior = encode(forced)
        np.testing.assert_array_equal(posterior.logvar, jnp.full((1, 2, 2, 2), limit))
        np.testing.assert_array_equal(posterior.mean, jnp.full((1, 2, 2, 2), bias))


def test_call_is_encode_sample_decode():
    x = jax.random.normal(KEY, (2, 8, 3))
    model = autoencoder.KLAutoencoder(**SMALL, attention=(False, True))
    variables = drawn(model, x, KEY)

    @jax.jit
    def both(variables):
        whole = model.apply(variables, x, KEY)
        z = model.apply(variables, x, method="encode").sample(KEY)
        return whole, model.apply(variables, z, method="decode")

    (y, posterior), decoded = both(variables)
    np.testing.assert_allclose(decoded, y, atol=1e-5)
    assert posterior.kl().shape == (2,)


def test_remat_marks_every_block():
    x = jnp.zeros((1, 4, 3))
    kwargs = SMALL | dict(mults=(1,), attention=(True,))
    variables = drawn(autoencoder.KLAutoencoder(**kwargs), x, KEY)

    def marks(remat):
        model = autoencoder.KLAutoencoder(**kwargs, remat=remat)
        return remats(lambda v: model.apply(v, x, KEY)[0], variables)

    # Residual blocks: 1 + 2 in the encoder, 2 + 2 in the decoder; attentions: 1 + 1, 2 + 1.
    assert (marks(False), marks(True)) == (0, 3 + 4 + 5)


def test_bf16_has_float32_parameters_and_output():
    x = jax.random.normal(KEY, (1, 8, 3))
    exact, half = (
        autoencoder.KLAutoencoder(**SMALL, dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16)
    )
    variables = drawn(half, x, KEY)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    (y, _), (low, posterior) = (jax.jit(model.apply)(variables, x, KEY) for model in (exact, half))
    assert low.dtype == posterior.mean.dtype == jnp.float32
    assert 0 < jnp.linalg.norm(low - y) < 0.05 * jnp.linalg.norm(y)


def test_dropout_needs_train():
    x = jax.random.normal(KEY, (1, 4, 3))
    model = autoencoder.KLAutoencoder(**SMALL, dropout=0.5)
    variables = drawn(model, x, KEY)
    jax.eval_shape(lambda: model.apply(variables, x, method="encode"))  # wants no rng

    @jax.jit
    def encode(key):
        return model.apply(variables, x, True, method="encode", rngs={"dropout": key}).mean

    assert not np.array_equal(encode(jax.random.key(1)), encode(jax.random.key(2)))


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match=r"attention=\(True,\) has 1 values for 2 levels"):
        autoencoder.KLAutoencoder(**SMALL, attention=(True,))
    with pytest.raises(ValueError, match="groups=32 does not divide 24 channels"):
        autoencoder.KLAutoencoder(width=24)
    model = autoencoder.KLAutoencoder(**SMALL)
    with pytest.raises(ValueError, match=r"factor, 2, does not divide the spatial shape \(8, 7\)"):
        jax.eval_shape(model.init, KEY, jnp.zeros((1, 8, 7, 3)), KEY)
    with pytest.raises(ValueError, match="channels=3"):
        jax.eval_shape(model.init, KEY, jnp.zeros((1, 8, 8, 4)), KEY)
    video = autoencoder.KLAutoencoder(**SMALL, stride=(1, 2, 2))
    with pytest.raises(ValueError, match=r"\(1, 2, 2\) has 3 values for 2 spatial axes"):
        jax.eval_shape(video.init, KEY, jnp.zeros((1, 8, 8, 3)), KEY)
