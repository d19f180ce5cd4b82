import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import tree
from ldm_jax.models import discriminator, features


def count(module, *shapes):
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    params = jax.eval_shape(module.init, jax.random.key(0), *arrays)
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def run(module, x, seed=1):
    return jax.jit(module.init_with_output)(jax.random.key(seed), x)


def noise(*shape):
    return jax.random.normal(jax.random.key(0), shape)


@pytest.mark.parametrize(("layers", "expected"), [(3, 2_765_633), (2, 663_361)])
def test_parameter_counts_of_the_reference(layers, expected):
    # By hand: 4x4 kernels, a bias in the first and the last one, two numbers a channel in norms.
    widths = [64 * min(2**i, 8) for i in range(layers + 1)]
    by_hand = 3 * 64 * 16 + 64 + widths[-1] * 16 + 1
    by_hand += sum(a * b * 16 + 2 * b for a, b in itertools.pairwise(widths))
    assert count(discriminator.PatchGAN(layers=layers), (1, 64, 64, 3)) == by_hand == expected


@pytest.mark.parametrize("norm", discriminator.NORMS)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_patches_of_any_rank(rank, norm):
    model = discriminator.PatchGAN(width=8, layers=2, norm=norm, groups=4)
    x = jax.ShapeDtypeStruct((2, *(16,) * rank, 3), jnp.float32)
    y, params = jax.eval_shape(model.init_with_output, jax.random.key(0), x)
    assert y.shape == (2, *(2,) * rank, 1)  # 16 -> 8 -> 4 -> 3 -> 2
    assert params["params"]["conv_2"]["kernel"].shape == (*(4,) * rank, 16, 32)


def test_a_patch_is_70_wide():
    model = discriminator.PatchGAN(width=2, norm="group", groups=1)
    x = noise(1, 256, 1)
    _, params = run(model, x)

    def middle(x):
        h = x  # group norm reads all positions: without it only the convolutions are left
        for name, stride in (
            ("conv_0", 2),
            ("conv_1", 2),
            ("conv_2", 2),
            ("conv_3", 1),
            ("conv_out", 1),
        ):
            kernel = params["params"][name]["kernel"]
            h = jax.lax.conv_general_dilated(
                h, kernel, (stride,), [(1, 1)], dimension_numbers=("NWC", "WIO", "NWC")
            )
        return h[0, 15, 0]

    touched = np.flatnonzero(np.asarray(jax.grad(middle)(x))[0, :, 0])
    assert touched.max() - touched.min() + 1 == 70


def test_batch_norm_has_the_statistics_of_the_batch():
    x = 3 + 2 * noise(4, 5, 6, 7)
    params = {"params": {"scale": jnp.ones(7), "bias": jnp.zeros(7)}}
    y = np.asarray(discriminator.BatchNorm().apply(params, x))
    np.testing.assert_allclose(y.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(y.std((0, 1, 2)), 1, atol=1e-5)


def test_group_norm_does_not_mix_samples_and_batch_norm_does():
    x = noise(2, 12, 3)
    for norm, mixes in (("group", False), ("batch", True)):
        model = discriminator.PatchGAN(width=8, layers=2, norm=norm, groups=4)
        y, params = run(model, x)
        other = jax.jit(model.apply)(params, x.at[1].add(5 * noise(12, 3)))
        assert (np.abs(y[0] - other[0]).max() > 1e-6) == mixes


def test_compute_dtype_leaves_parameters_and_scores_float32():
    y, params = run(discriminator.PatchGAN(width=8, layers=1, dtype=jnp.bfloat16), noise(2, 8, 3))
    assert y.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}


def test_initial_weights_of_the_reference():
    _, params = run(discriminator.PatchGAN(width=32), noise(1, 32, 3))
    p = params["params"]
    np.testing.assert_allclose(np.std(p["conv_2"]["kernel"]), 0.02, rtol=0.05)
    np.testing.assert_allclose(np.mean(p["norm_3"]["scale"]), 1, atol=0.01)
    np.testing.assert_allclose(np.std(p["norm_3"]["scale"]), 0.02, rtol=0.3)


def test_bad_input_is_named():
    x = jnp.zeros((1, 16, 16, 3))
    for kwargs, message in (
        (dict(norm="layer"), "choose among"),
        (dict(norm="group", width=40), "does not divide"),
        (dict(layers=3), "at least 24 positions"),
    ):
        with pytest.raises(ValueError, match=message):
            discriminator.PatchGAN(**kwargs).init(jax.random.key(0), x)


# ---- features ------------------------------------------------------------------------------------


def test_vgg16_has_its_parameter_count_and_maps():
    model = features.VGG16Features()
    assert count(model, (1, 32, 32, 3)) == 14_714_688
    x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    maps = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x)[0], x)
    assert [m.shape[1:] for m in maps] == [
        (32, 32, 64),
        (16, 16, 128),
        (8, 8, 256),
        (4, 4, 512),
        (2, 2, 512),
    ]
    params = jax.eval_shape(model.init, jax.random.key(0), x)
    assert "params/conv4_3/kernel" in tree.names(params)


def test_vgg16_normalises_as_lpips_does():
    """LPIPS' ScalingLayer for images in [-1, 1]: (x - shift) / scale, figures of its repository."""
    shift, scale = np.array([-0.030, -0.088, -0.188]), np.array([0.458, 0.448, 0.450])
    x = jax.random.uniform(jax.random.key(0), (2, 5, 3), minval=-1)
    np.testing.assert_allclose(features.standardised(x), (x - shift) / scale, atol=1e-5)


def test_perceptual_distance_by_hand():
    x, y = np.array([[[3.0, 4.0], [1.0, 0.0]]]), np.array([[[4.0, 3.0], [0.0, 2.0]]])  # [1, 2, 2]

    def layers(x):
        return x, 10 * x[:, :1]  # the second layer sees the first position only

    by_hand = [(0.08 + 2) / 2, 0.08]  # (.6, .8) - (.8, .6) and (1, 0) - (0, 1), squared
    d = features.perceptual_distance(layers, jnp.asarray(x), jnp.asarray(y))
    np.testing.assert_allclose(d, [sum(by_hand)], rtol=1e-5)
    weights = (jnp.array([2.0, 0.0]), jnp.array([0.0, 1.0]))
    d = features.perceptual_distance(layers, jnp.asarray(x), jnp.asarray(y), weights)
    np.testing.assert_allclose(d, [(2 * 0.04 + 2 * 1) / 2 + 0.04], rtol=1e-5)


def test_perceptual_distance_of_equal_images_is_zero_with_a_finite_gradient():
    def layers(x):
        return jnp.maximum(x, 0), jnp.zeros_like(x)  # features that are all zero

    x, y = -jnp.ones((2, 4, 4, 3)), noise(2, 4, 4, 3)
    np.testing.assert_array_equal(features.perceptual_distance(layers, y, y), 0)
    grad = jax.grad(lambda x: features.perceptual_distance(layers, x, y).sum())(x)
    assert np.all(np.isfinite(grad))


def test_perceptual_distance_wants_one_weight_a_layer():
    x = jnp.ones((1, 4, 3))
    with pytest.raises(ValueError, match="1 weights for 2 layers"):
        features.perceptual_distance(lambda x: (x, x), x, x, (jnp.ones(3),))
