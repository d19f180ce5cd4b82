import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.nn import attention, taps
from ldm_jax.nn import prompt_to_prompt as p2p
from ldm_jax.types import Cond
from tests.drawn import drawn


def test_alignment():
    """0 begins, 9 ends and fills."""
    align, share = p2p.alignment([0, 1, 2, 3, 9, 9], [0, 1, 7, 3, 9, 9])
    np.testing.assert_array_equal(align, np.eye(6))  # replaced
    np.testing.assert_array_equal(share, 1)
    align, share = p2p.alignment([0, 1, 2, 9, 9, 9], [0, 1, 5, 2, 9, 9])
    assert share.tolist() == [1, 1, 0, 1, 1, 1]  # a word was added
    assert [int(row.argmax()) for row in align.T[[0, 1, 3, 4, 5]]] == [0, 1, 2, 3, 4]
    assert align[:, 2].sum() == 0
    align, _ = p2p.alignment([0, 1, 2, 9, 9], [0, 1, 5, 6, 9])
    np.testing.assert_allclose(align[2], [0, 0, 0.5, 0.5, 0])
    _, share = p2p.alignment([0, 1, 2, 9], [0, 1, 5, 9], refine=True)
    assert share.tolist() == [1, 1, 0, 1]
    assert p2p.positions([0, 4, 5, 4, 9], [4, 5]).tolist() == [False, True, True, False, False]
    with pytest.raises(ValueError, match="are not among those of the prompt"):
        p2p.positions([0, 4, 9], [5])


def test_maps():
    rng = np.random.default_rng(0)
    source, edited = rng.random((2, 1, 2, 3, 4)).astype(np.float32)
    exchange = p2p.Exchange(
        jnp.eye(4)[None, :, ::-1],
        jnp.float32([[1, 0, 0.5, 1]]),
        jnp.float32([[1, 1, 1, 3]]),
        0.0,
        0.0,
    )
    found = p2p.exchanged_maps(exchange, jnp.asarray(source), jnp.asarray(edited))
    np.testing.assert_allclose(found[..., 0], source[..., 3], rtol=1e-6)
    np.testing.assert_allclose(found[..., 1], edited[..., 1], rtol=1e-6)
    np.testing.assert_allclose(found[..., 2], (source[..., 1] + edited[..., 2]) / 2, rtol=1e-6)
    np.testing.assert_allclose(found[..., 3], 3 * source[..., 0], rtol=1e-6)
    with pytest.raises(ValueError, match="maps of 4 and 3 tokens do not fit"):
        p2p.exchanged_maps(exchange, jnp.asarray(source), jnp.asarray(edited[..., :3]))


def test_a_network_with_exchanged_attention():
    """Rows: source, edited, and one more that stays out of it."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(np.repeat(rng.standard_normal((1, 4, 4, 8)), 3, 0), jnp.float32)
    tokens = jnp.asarray(rng.standard_normal((3, 5, 6)), jnp.float32)
    module = attention.SpatialTransformer(heads=2, groups=4, depth=2)
    variables = drawn(module, x, tokens)

    def network(x, t, cond):
        return module.apply(variables, x, cond.tokens)

    def exchange(**settings):
        ones = jnp.ones((1, 5))
        plain = dict(
            align=jnp.eye(5)[None], share=ones, weigh=ones, cross_until=0.0, self_until=0.0
        )
        return p2p.Exchange(**plain | settings)

    never, some = jnp.inf, jnp.full((3,), 0.5)

    @jax.jit
    def run(tokens):
        cond = Cond(tokens=tokens)
        kinds = {
            "off": exchange(cross_until=never, self_until=never),
            "late": exchange(cross_until=0.6, self_until=0.6),
            "own words": exchange(share=jnp.zeros((1, 5)), self_until=never),
            "all": exchange(),
            "large": exchange(self_size=8, cross_until=never),
            "silent": exchange(weigh=jnp.zeros((1, 5)), self_until=never),
        }
        found = {k: p2p.exchanging(network, e)(x, some, cond) for k, e in kinds.items()}

        def mute(path, reads_tokens, space, mix, q, k, v, mask):
            return jnp.zeros_like(q) if reads_tokens else mix(q, k, v, mask)

        return network(x, some, cond), taps.attended(network, mute)(x, some, cond), found

    plain, muted, found = run(tokens)
    for kind, out in found.items():
        np.testing.assert_allclose(out[::2], plain[::2], atol=1e-5, err_msg=kind)
    for kind in ("off", "late", "own words", "large"):
        np.testing.assert_allclose(found[kind][1], plain[1], atol=1e-5, err_msg=kind)
    assert np.abs(found["all"] - plain)[1].max() > 1e-3
    np.testing.assert_allclose(found["silent"][1], muted[1], atol=1e-5)  # nothing of any word
    # Another prompt with the same values would be the same picture; the same prompt is.
    same, _, again = run(tokens.at[1].set(tokens[0]))
    np.testing.assert_allclose(again["all"][1], same[0], atol=1e-5)
    with pytest.raises(ValueError, match="1 rows are no 1 pairs"):
        p2p.exchanging(network, exchange())(x[:1], some[:1], Cond(tokens=tokens[:1]))
