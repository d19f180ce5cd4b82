"""The layers, against closed forms, against each other and against flax's own."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.nn import attention, conv, embeddings, norms, once
from tests.drawn import drawn

KEY = jax.random.key(0)


def random(*shape, key=0):
    return jax.random.normal(jax.random.key(key), shape)


# ---- convolution and resampling


def test_per_axis():
    assert conv.per_axis(2, 3) == (2, 2, 2)
    assert conv.per_axis([1, 2], 2) == (1, 2)
    with pytest.raises(ValueError, match=r"\(1, 2, 2\) has 3 values for 2 spatial axes"):
        conv.per_axis((1, 2, 2), 2)


@pytest.mark.parametrize(
    ("rank", "kernel", "stride"), [(1, 3, 1), (1, 4, 1), (2, 1, 1), (2, 3, 2), (3, 3, 1)]
)
def test_convolution_is_flax_convolution(rank, kernel, stride):
    x = random(2, *(6, 5, 4)[:rank], 3)
    ours = conv.Conv(4, kernel, stride)
    variables = drawn(ours, x)
    before, after = (kernel - 1) // 2, kernel // 2
    theirs = nn.Conv(4, (kernel,) * rank, stride, [(before, after)] * rank)
    np.testing.assert_allclose(ours.apply(variables, x), theirs.apply(variables, x), atol=1e-5)


def test_kernels_are_drawn_as_in_torch():
    """Uniform in ±1/√fan_in."""
    kernel = conv.fan_in_uniform(KEY, (3, 3, 32, 64))
    limit = (32 * 9) ** -0.5
    assert 0.99 * limit < jnp.abs(kernel).max() <= limit
    np.testing.assert_allclose(kernel.std(), limit / 3**0.5, rtol=0.02)


@pytest.mark.parametrize("stride", [2, 3, (1, 2), (4, 1)])
def test_average_of_nearest_is_the_identity(stride):
    x = random(2, 3, 4, 5)
    big = conv.nearest(x, stride)
    assert big.shape == (
        2,
        *(n * s for n, s in zip((3, 4), conv.per_axis(stride, 2), strict=True)),
        5,
    )
    np.testing.assert_allclose(conv.average_pool(big, stride), x, atol=1e-6)


def test_resampling_by_hand():
    x = jnp.array([1.0, 2.0, 3.0, 6.0]).reshape(1, 4, 1)
    np.testing.assert_array_equal(conv.nearest(x[:, :2], 2).ravel(), [1, 1, 2, 2])
    np.testing.assert_array_equal(conv.average_pool(x, 2).ravel(), [1.5, 4.5])
    ones = {"params": {"conv": {"kernel": jnp.ones((3, 1, 1)), "bias": jnp.zeros(1)}}}
    np.testing.assert_array_equal(conv.Downsample(2).apply(ones, x).ravel(), [0 + 1 + 2, 2 + 3 + 6])
    np.testing.assert_array_equal(
        conv.Downsample(2, (0, 1)).apply(ones, x).ravel(), [1 + 2 + 3, 3 + 6 + 0]
    )
    np.testing.assert_array_equal(conv.Upsample(2).apply(ones, x[:, :2]).ravel(), [2, 4, 5, 4])


@pytest.mark.parametrize("pad", [(1, 1), (0, 1)])
def test_a_stride_per_axis_shrinks_only_its_axes(pad):
    x = jnp.zeros((1, 5, 4, 6, 2))
    y, _ = jax.eval_shape(conv.Downsample((1, 2, 2), pad).init_with_output, KEY, x)
    assert y.shape == (1, 5, 2, 3, 2)


# ---- group normalisation


def test_group_norm_is_flax_group_norm():
    x = 3.0 * random(2, 3, 4, 8) + random(8, key=1)
    weights = random(*x.shape, key=4)
    ours, theirs = norms.GroupNorm(4, 1e-5), nn.GroupNorm(4, epsilon=1e-5, use_fast_variance=False)

    @jax.jit
    def both(variables, x):
        def loss(variables, x, f):
            y = f.apply(variables, x)
            return jnp.sum(weights * y), y

        return [
            jax.value_and_grad(lambda v, x, f=f: loss(v, x, f), (0, 1), has_aux=True)(variables, x)
            for f in (ours, theirs)
        ]

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
        *both(drawn(ours, x), x),
    )


UNIT = {"params": {"scale": jnp.ones(4), "bias": jnp.zeros(4)}}


def test_group_norm_survives_a_mean_far_above_the_deviation():
    x = np.asarray(random(1, 64, 64, 4), np.float64) + 3000.0
    x = x.astype(np.float32)
    groups = x.astype(np.float64).reshape(1, -1, 2, 2)
    exact = (groups - groups.mean((1, 3), keepdims=True)) / groups.std((1, 3), keepdims=True)
    y = jax.jit(norms.GroupNorm(2, 1e-6).apply)(UNIT, x)
    np.testing.assert_allclose(y, exact.reshape(x.shape), atol=2e-3)


def test_group_norm_statistics_are_float32_and_constants_give_the_bias():
    x = (100.0 + random(1, 16, 16, 4)).astype(jnp.bfloat16)
    y = jax.jit(norms.GroupNorm(2, dtype=jnp.bfloat16).apply)(UNIT, x)
    exact = jax.jit(norms.GroupNorm(2).apply)(UNIT, x.astype(jnp.float32))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))
    constant = norms.GroupNorm(2).apply(UNIT, jnp.full((1, 4, 4, 4), 7.0))
    np.testing.assert_allclose(constant, jnp.zeros((1, 4, 4, 4)), atol=1e-3)


def test_groups_must_divide():
    with pytest.raises(ValueError, match="groups=32 does not divide 24 channels"):
        jax.eval_shape(norms.GroupNorm().init, KEY, jnp.zeros((1, 4, 24)))


# ---- embeddings


def test_sinusoid_in_float64():
    t = np.array([0.0, 0.25, 1.0, 999.0])
    w = 10_000.0 ** (-np.arange(4) / 4)
    expected = np.concatenate([np.cos(t[:, None] * w), np.sin(t[:, None] * w)], axis=1)
    np.testing.assert_allclose(
        embeddings.sinusoid(jnp.asarray(t, jnp.float32), 8), expected, atol=1e-4
    )
    with pytest.raises(ValueError, match="even width and got 7"):
        embeddings.sinusoid(jnp.zeros(1), 7)


# ---- attention


def test_attend_by_hand():
    q, k, v = (np.asarray(random(2, n, 3, 4, key=i), np.float64) for i, n in enumerate((5, 6, 6)))
    mask = np.array([[1, 1, 0, 1, 0, 1], [1, 0, 0, 0, 0, 0]], bool)
    for keep in (None, mask):
        expected = np.zeros_like(q)
        for b, h in np.ndindex(2, 3):
            logits = q[b, :, h] @ k[b, :, h].T / 2.0
            weights = np.exp(logits) * (1 if keep is None else keep[b])
            expected[b, :, h] = weights / weights.sum(1, keepdims=True) @ v[b, :, h]
        arrays = (jnp.asarray(y, jnp.float32) for y in (q, k, v))
        got = jax.jit(attention.attend)(*arrays, None if keep is None else jnp.asarray(keep))
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_attend_without_any_key_is_the_mean_not_nan():
    q, k, v = (random(1, 4, 1, 8, key=i) for i in range(3))
    got = attention.attend(q, k, v, jnp.zeros((1, 4), bool))
    np.testing.assert_allclose(got, jnp.broadcast_to(v.mean(1, keepdims=True), v.shape), atol=1e-6)


def test_attend_in_bfloat16_has_a_float32_softmax():
    q, k, v = (random(1, 64, 2, 8, key=i).astype(jnp.bfloat16) for i in range(3))
    exact = attention.attend(*(y.astype(jnp.float32) for y in (q, k, v)))
    got = attention.attend(q, k, v)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), exact, atol=0.02)


def test_a_spatial_transformer_reads_only_unmasked_tokens():
    x, tokens = random(2, 3, 4, 8), random(2, 5, 6, key=1)
    layer = attention.SpatialTransformer(heads=2, depth=2, groups=4)
    variables = drawn(layer, x, tokens)
    apply = jax.jit(layer.apply)
    mask = jnp.arange(5)[None] < jnp.array([[2], [5]])
    out = apply(variables, x, tokens, mask)
    other = apply(variables, x, jnp.where(mask[..., None], tokens, 100.0), mask)
    np.testing.assert_allclose(out, other, atol=1e-6)
    assert not np.allclose(out[0], apply(variables, x, tokens, jnp.ones_like(mask))[0], atol=1e-3)
    np.testing.assert_allclose(out[0], apply(variables, x[:1], tokens[:1, :2])[0], atol=1e-5)


@pytest.mark.parametrize("tokens", [None, (1, 5, 6)])
def test_conv_and_linear_projections_are_the_same_mathematics(tokens):
    x = random(1, 3, 4, 8)
    tokens = None if tokens is None else random(*tokens, key=1)
    stored = attention.SpatialTransformer(heads=2, groups=4)
    linear = attention.SpatialTransformer(heads=2, groups=4, projection="linear")
    variables = drawn(stored, x, tokens)
    params = dict(variables["params"])
    for name in ("proj_in", "proj_out"):
        params[name] = params[name] | {"kernel": params[name]["kernel"][0, 0]}
    got = jax.jit(linear.apply)({"params": params}, x, tokens)
    np.testing.assert_allclose(got, jax.jit(stored.apply)(variables, x, tokens), atol=1e-5)


def test_attention_commutes_with_permutations_of_positions():
    x = random(1, 6, 8)
    layer = attention.AttentionBlock(heads=2, groups=4)
    variables = drawn(layer, x)
    order = jnp.array([3, 1, 5, 0, 2, 4])
    apply = jax.jit(layer.apply)
    y = apply(variables, x)
    np.testing.assert_allclose(apply(variables, x[:, order]), y[:, order], atol=1e-5)
    np.testing.assert_allclose(
        apply(variables, x.reshape(1, 2, 3, 8)), y.reshape(1, 2, 3, 8), atol=1e-5
    )
    with pytest.raises(ValueError, match="3 heads do not divide 8 channels"):
        jax.eval_shape(attention.AttentionBlock(heads=3, groups=4).init, KEY, x)


# ---- residual block


@pytest.mark.parametrize(
    ("scale_shift", "resample", "shape"),
    [(False, None, (4, 6)), (True, "down", (2, 3)), (True, "up", (8, 12))],
)
def test_a_residual_block_without_its_branch_is_its_skip(scale_shift, resample, shape):
    x, emb = random(2, 4, 6, 8), random(2, 5, key=1)
    block = conv.ResBlock(8, groups=4, scale_shift=scale_shift, resample=resample)
    params = drawn(block, x, emb)["params"]
    assert params["emb"]["kernel"].shape == (5, 16 if scale_shift else 8)
    apply = jax.jit(block.apply)
    skip = {None: lambda x, s: x, "down": conv.average_pool, "up": conv.nearest}[resample](x, 2)
    silent = params | {"conv2": jax.tree.map(jnp.zeros_like, params["conv2"])}
    np.testing.assert_allclose(apply({"params": silent}, x, emb), skip, atol=1e-6)
    # The embedding reaches the output, and only that of its own sample.
    y, z = (apply({"params": params}, x, e) for e in (emb, emb.at[1].add(1.0)))
    assert y.shape == (2, *shape, 8)
    np.testing.assert_allclose(y[0], z[0], atol=1e-6)
    assert np.abs(y[1] - z[1]).max() > 1e-3
    wider = jax.eval_shape(
        conv.ResBlock(12, groups=4, resample=resample).init_with_output, KEY, x, emb
    )[0]
    assert wider.shape == (2, *shape, 12)


def test_blocks_that_are_alike_are_traced_once_and_drawn_apart():
    traced = []

    class Block(nn.Module):
        width: int

        @nn.compact
        def __call__(self, x, train):
            traced.append(self.width)
            return nn.Dropout(0.5, deterministic=not train)(nn.Dense(self.width, name="dense")(x))

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            outputs = []
            for i, width in enumerate((4, 4, 4, 3)):
                outputs.append(once.once(Block, False, (2,))(width, name=f"block_{i}")(x, train))
            return outputs

    network, x = Network(), jnp.ones((64, 5))
    variables = network.init(jax.random.key(0), x, False)
    assert traced == [4, 3]
    kernels = [variables["params"][f"block_{i}"]["dense"]["kernel"] for i in range(3)]
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-2
    assert np.abs(kernels[1] - kernels[2]).max() > 1e-2
    outputs = network.apply(variables, x, True, rngs={"dropout": jax.random.key(1)})
    kept = [np.asarray(y != 0) for y in outputs[:3]]
    assert (kept[0] != kept[1]).any()  # each has its own mask
    assert (kept[1] != kept[2]).any()
    assert all(0.3 < k.mean() < 0.7 for k in kept)
    plain = network.apply(variables, x, False)
    for y, kernel in zip(plain, kernels, strict=False):
        np.testing.assert_allclose(y, x @ kernel, rtol=1e-5)


def test_values_of_groups_come_to_their_channels_to_the_bit():
    """On the CPU by a product, elsewhere by repeating them."""
    z = jax.random.normal(jax.random.key(0), (3, 8)) * 10.0 ** jnp.arange(-4, 4)
    np.testing.assert_array_equal(jax.jit(norms._spread, static_argnums=1)(z, 4), z.repeat(4, 1))
