import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion import conditions, finishes, guidance, process, targets
from ldm_jax.types import Cond
from tests.exact import PATHS

PATH = PATHS["cosine"]
B = 3
X = jax.random.normal(jax.random.key(0), (B, 4, 4, 2))
T = jnp.array([0.3, 0.5, 0.8])
CALLS = []


def network(x, t, cond):
    """Reads every way into a network, tokens by masked mean."""
    CALLS.append(x.shape[0])
    out = jnp.tanh(x + t.reshape(-1, 1, 1, 1) / 1000)
    if cond.vector is not None:
        out += cond.vector[:, None, None, :2]
    if cond.tokens is not None:
        mask = jnp.ones(cond.tokens.shape[:2], bool) if cond.mask is None else cond.mask
        mean = (cond.tokens * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
        out *= 1 + mean[:, None, None, :2]
    if cond.spatial is not None:
        out += cond.spatial.mean(-1, keepdims=True)
    return out


DENOISE = jax.jit(process.make_denoiser(network, PATH, targets.v()))


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


COND = Cond(
    normal(1, B, 2),
    normal(2, B, 5, 2),
    jnp.arange(5) < jnp.array([[2], [5], [3]]),
    normal(3, B, 4, 4, 1),
)
NULL = Cond(normal(4, B, 2), normal(5, B, 5, 2), jnp.ones((B, 5), bool), jnp.zeros((B, 4, 4, 1)))


def test_scale_1_is_the_model_and_0_the_unconditional_one():
    for scale, cond in ((1.0, COND), (0.0, NULL)):
        got, want = guidance.cfg(DENOISE, NULL, scale)(X, T, COND), DENOISE(X, T, cond)
        np.testing.assert_allclose(got.x0, want.x0, atol=1e-6)
        np.testing.assert_allclose(got.eps, want.eps, atol=1e-6)


def test_scale_1_is_bitwise_the_conditional_half():
    """The batch is doubled, and nothing else: a network that treats rows alike gives the same bits."""
    doubled = DENOISE(
        jnp.concatenate([X, X]), jnp.concatenate([T, T]), conditions.join((COND, NULL), B)
    )
    np.testing.assert_array_equal(guidance.cfg(DENOISE, NULL, 1.0)(X, T, COND).x0, doubled.x0[:B])


@pytest.mark.parametrize("scale", [3.0, jnp.array([0.5, 1.0, 7.5])])
def test_guidance_extrapolates_from_the_null_condition(scale):
    positive, negative = DENOISE(X, T, COND), DENOISE(X, T, NULL)
    got = guidance.cfg(DENOISE, NULL, scale)(X, T, COND)
    w = process.over(jnp.asarray(scale), X)
    for g, p, n in zip(got, positive, negative, strict=True):
        np.testing.assert_allclose(g, n + w * (p - n), rtol=1e-4, atol=1e-4)


def test_one_call_on_a_doubled_batch():
    CALLS.clear()
    denoise = process.make_denoiser(network, PATH, targets.v())
    jax.eval_shape(guidance.cfg(denoise, NULL, 2.0), X, T, COND)
    assert CALLS == [2 * B]


def test_a_null_condition_of_one_row_serves_the_batch():
    one = jax.tree.map(lambda a: a[:1], NULL)
    many = jax.tree.map(lambda a: jnp.repeat(a[:1], B, 0), NULL)
    got, want = (guidance.cfg(DENOISE, null, 2.0)(X, T, COND).x0 for null in (one, many))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("masked", [True, False])
def test_token_lists_of_different_length_are_merged(masked):
    short = Cond(tokens=normal(5, 1, 3, 2))
    long = Cond(tokens=COND.tokens, mask=COND.mask if masked else None)
    got = guidance.cfg(DENOISE, short, 2.0)(X, T, long)
    want = (
        2 * DENOISE(X, T, long).x0 - DENOISE(X, T, Cond(tokens=jnp.repeat(short.tokens, B, 0))).x0
    )
    np.testing.assert_allclose(got.x0, want, atol=1e-5)


def test_tokens_without_masks_stay_without():
    plain = Cond(tokens=COND.tokens)
    assert conditions.join((plain, plain), B).mask is None


@pytest.mark.parametrize(
    ("cond", "null"), [(COND, Cond()), (Cond(), Cond(vector=jnp.ones((B, 2))))]
)
def test_conditions_of_different_kinds_raise(cond, null):
    with pytest.raises(ValueError, match=r"has the field 'vector' and the .* has not"):
        conditions.join((cond, null), B)


def test_guided_predictions_still_explain_x_t():
    denoise = guidance.cfg(DENOISE, NULL, 6.0, finishes.rescale(PATH, 0.7))
    for d in (guidance.cfg(DENOISE, NULL, 6.0), denoise):
        x0, eps = d(X, T, COND)
        again = process.add_noise(PATH, x0, eps, T)
        np.testing.assert_allclose(again, X, rtol=1e-3, atol=1e-3)


def test_rescale_restores_the_standard_deviation():
    positive = DENOISE(X, T, COND).x0
    plain = guidance.cfg(DENOISE, NULL, 6.0)(X, T, COND).x0
    zero, one = (
        guidance.cfg(DENOISE, NULL, 6.0, finishes.rescale(PATH, phi))(X, T, COND).x0
        for phi in (0.0, 1.0)
    )
    np.testing.assert_allclose(zero, plain, rtol=1e-5)
    axes = (1, 2, 3)
    np.testing.assert_allclose(one.std(axes), positive.std(axes), rtol=1e-4)
    assert (plain.std(axes) > 1.2 * positive.std(axes)).all()


def test_an_interval_guides_only_inside():
    guided = guidance.cfg(DENOISE, NULL, 4.0)
    limited = guidance.interval(
        guided, DENOISE, 0.4, 0.6
    )  # of T = 0.3, 0.5, 0.8 the second is inside
    got, inside, outside = (d(X, T, COND).x0 for d in (limited, guided, DENOISE))
    for i, want in enumerate((outside, inside, outside)):
        np.testing.assert_allclose(got[i], want[i], atol=1e-6)


def test_outside_of_its_interval_guidance_costs_nothing():
    rows = []

    def counted(x, t, cond):
        jax.debug.callback(lambda: rows.append(x.shape[0]))
        return DENOISE(x, t, cond)

    limited = jax.jit(guidance.interval(guidance.cfg(counted, NULL, 4.0), counted, 0.4, 0.6))
    for t, want in ((0.2, [B]), (0.5, [2 * B]), (0.9, [B])):
        rows.clear()
        jax.block_until_ready(limited(X, jnp.full(B, t), COND))
        jax.effects_barrier()
        assert rows == want, t
