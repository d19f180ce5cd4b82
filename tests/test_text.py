import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models import text
from tests.drawn import drawn

SMALL = dict(vocab=11, width=24, layers=2, length=8, heads=2, head_dim=4)
IDS = jnp.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


@pytest.fixture(scope="module")
def params():
    return drawn(text.TextTransformer(**SMALL), IDS)


def encode(params, ids, mask=None, **kwargs):
    return jax.jit(text.TextTransformer(**SMALL | kwargs).apply)(params, ids, mask)


@pytest.mark.parametrize(
    ("name", "vocab", "width", "layers", "length", "expected"),
    [
        ("txt2img-1p4B", 30522, 1280, 32, 77, 542_895_360),
        ("text2img256", 30522, 640, 32, 77, 166_590_080),
        ("layout2img", 8192, 512, 16, 92, 54_656_000),
    ],
)
def test_parameter_counts_of_compvis(name, vocab, width, layers, length, expected):
    model = text.TextTransformer(vocab=vocab, width=width, layers=layers, length=length)
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == expected


def test_a_masked_token_is_not_read(params):
    mask = jnp.array([[True, True, True, False, False]] * 2)
    y = encode(params, IDS, mask)
    other = encode(params, IDS.at[:, 3:].set(7), mask)
    np.testing.assert_allclose(y[:, :3], other[:, :3], atol=1e-6)
    # Masked tokens are as good as absent ones, since positions count from the left.
    np.testing.assert_allclose(y[:, :3], encode(params, IDS[:, :3]), atol=1e-5)
    assert np.abs(encode(params, IDS)[:, :3] - y[:, :3]).max() > 1e-3


def test_the_encoder_looks_both_ways_and_knows_positions(params):
    y = encode(params, IDS)
    assert np.abs(encode(params, IDS.at[:, 4].set(0))[:, 0] - y[:, 0]).max() > 1e-4
    assert np.abs(y[0, 1] - y[0, 3]).max() > 1e-3  # the same token twice


def test_remat_and_bfloat16_keep_the_parameters_and_the_values(params):
    y = encode(params, IDS)
    np.testing.assert_allclose(encode(params, IDS, remat=True), y, atol=1e-6)
    low = encode(params, IDS, dtype=jnp.bfloat16)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(low), y, atol=0.1)
    model = text.TextTransformer(**SMALL, dtype=jnp.bfloat16, remat=True)
    born = jax.eval_shape(model.init, jax.random.key(0), IDS)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), born) == jax.tree.map(
        lambda a: (a.shape, a.dtype), params
    )


def test_too_many_tokens_are_refused(params):
    with pytest.raises(ValueError, match="8 positions and got 9 tokens"):
        encode(params, jnp.zeros((1, 9), jnp.int32))


def test_the_encoder_starts_as_its_embeddings():
    model = text.TextTransformer(**SMALL)
    params = jax.jit(model.init)(jax.random.key(0), IDS)
    tables = params["params"]
    x = tables["token"]["embedding"][IDS] + tables["position"][: IDS.shape[1]]
    normed = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(encode(params, IDS), normed, atol=1e-4)


def test_positions_may_start_as_sinusoids():
    model = text.TextTransformer(**SMALL | dict(embedding_std=0.5, position_period=100.0))
    started = model.init(jax.random.key(0), IDS)["params"]["position"]
    n, i = np.arange(8)[:, None], np.arange(12)
    angle = n * 100.0 ** (-i / 12)
    expected = 0.5**0.5 * np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
    np.testing.assert_allclose(started, expected, atol=1e-6)
    # Every position is as large, and neighbours are as far apart wherever they are.
    np.testing.assert_allclose((started**2).mean(1), 0.5**2, rtol=1e-5)
    apart = ((started[1:] - started[:-1]) ** 2).sum(1)
    np.testing.assert_allclose(apart, apart[0], rtol=1e-4)
