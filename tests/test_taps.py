"""Looking into attention from outside, and changing it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import codec, heatmaps
from ldm_jax.data import tokenizer
from ldm_jax.diffusion import samplers, targets
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.models import unet
from ldm_jax.nn import attention, once, taps
from ldm_jax.types import Cond
from tests.drawn import drawn
from tests.exact import PATHS
from tests.tiny import quick_compiles  # noqa: F401 (a fixture of this module)

KEY = jax.random.key(0)
UNET = unet.UNet(width=4, mults=(1, 2), blocks=1, attention=(0, 1), heads=2, groups=2)
X, T = jax.random.normal(KEY, (2, 4, 6, 3)), jnp.array([0.2, 0.7])
COND = Cond(tokens=jax.random.normal(KEY, (2, 5, 3)), mask=jnp.arange(5) < jnp.array([[5], [3]]))


def softmax(z):
    z = np.exp(z - z.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


def test_maps_are_the_softmax_of_queries_and_keys():
    module = attention.Attention(heads=2, head_dim=4)
    x, tokens = X.reshape(2, 24, 3), COND.tokens
    variables = drawn(module, x, tokens)
    params = jax.tree.map(np.asarray, variables["params"])
    network = lambda *args: module.apply(variables, *args)  # noqa: E731
    q = (np.asarray(x) @ params["q"]["kernel"]).reshape(2, 24, 2, 4)
    for of_tokens, source, mask in ((True, tokens, COND.mask), (False, x, None)):
        args = (x, tokens, mask) if of_tokens else (x,)
        out, maps = taps.with_maps(network, of_tokens)(*args)
        k = (np.asarray(source) @ params["k"]["kernel"]).reshape(2, -1, 2, 4)
        logits = np.einsum("bnhd,bmhd->bhnm", q, k) / 2
        if mask is not None:
            logits = np.where(mask[:, None, None], logits, -np.inf)
        np.testing.assert_allclose(maps[""], softmax(logits), rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(out, network(*args))
    # Perturbed, each position reads its own value; attention to tokens stays.
    v = np.asarray(x) @ params["v"]["kernel"]
    want = v @ params["out"]["kernel"] + params["out"]["bias"]
    perturbed = taps.with_identity(network, (".*",))
    np.testing.assert_allclose(perturbed(x), want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"no self-attention lies in the block '\.\*'"):
        perturbed(x, tokens)


def test_a_network_is_seen_and_changed_block_by_block():
    variables = drawn(UNET, X, T, COND)
    network = lambda *args: UNET.apply(variables, *args)  # noqa: E731
    assert taps.with_identity(network, ()) is network

    @jax.jit
    def every():
        plain = network(X, T, COND)  # traced first, and its alike blocks once
        changed = [taps.with_identity(network, b)(X, T, COND) for b in BLOCKS]
        tapped = [taps.with_maps(network, kind)(X, T, COND) for kind in (True, False)]
        return plain, changed, tapped

    plain, changed, ((out, cross), (out_too, own)) = every()
    np.testing.assert_allclose(out, plain, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(out_too, plain, rtol=1e-5, atol=1e-6)
    moved = [np.abs(c - plain).max() for c in changed]
    assert min(moved) > 1e-4
    assert len({round(float(m), 5) for m in moved}) == len(BLOCKS)
    # One block at the coarse level three times, and one in the middle.
    assert len(cross) == len(own) == 3 + 1
    assert cross["mid/attn/block_0/cross_attn"].shape == (2, 2, 2, 3, 5)
    assert own["up_0/attn_1/block_0/self_attn"].shape == (2, 2, 2, 3, 6)
    for maps in (cross, own):
        for path, weights in maps.items():
            np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5, err_msg=path)
    assert all(np.abs(weights[1, ..., 3:]).max() == 0 for weights in cross.values())  # masked
    heat = taps.heat(cross, (4, 6))
    assert heat.shape == (2, 4, 6, 5)
    np.testing.assert_allclose(heat.sum(-1), 1, rtol=1e-5)
    received = taps.received(own["mid/attn/block_0/self_attn"])
    np.testing.assert_allclose(received.mean((1, 2)), 1, rtol=1e-5)
    assert received.shape == (2, 2, 3)


BLOCKS = (("mid",), ("down_.", "up_0/attn_1"))


def test_a_network_apart_is_neither_seen_nor_changed():
    variables = drawn(UNET, X, T, COND)

    def network(*args):
        return UNET.apply(variables, *args)

    beside = taps.apart(network)
    both = taps.with_identity(lambda *args: network(*args) + 2 * beside(*args), ("mid",))
    plain, changed = network(X, T, COND), taps.with_identity(network, ("mid",))(X, T, COND)
    assert np.abs(changed - plain).max() > 1e-3
    np.testing.assert_allclose(both(X, T, COND), changed + 2 * plain, atol=1e-4)
    with pytest.raises(ValueError, match="no self-attention"):
        taps.with_maps(beside, False)(X, T, COND)


def test_blocks_that_are_not_there():
    network = lambda *args: UNET.init_with_output(KEY, *args)[0]  # noqa: E731
    with pytest.raises(ValueError, match=r"no self-attention lies in the block 'middle' .* 'mid/"):
        jax.eval_shape(taps.with_identity(network, ("mid", "middle")), X, T, COND)
    with pytest.raises(ValueError, match="in the block 'up_'"):
        jax.eval_shape(taps.with_identity(network, ("up_",)), X, T, COND)  # no whole part
    plain = UNET.clone(transformer=False, attention=(1, 1))
    network = lambda *args: plain.init_with_output(KEY, *args)[0]  # noqa: E731
    with pytest.raises(ValueError, match="no cross-attention, which reads tokens"):
        jax.eval_shape(taps.with_maps(network, True), X, T)
    _, maps = jax.eval_shape(taps.with_maps(network, False, ("mid",)), X, T)
    assert {k: v.shape for k, v in maps.items()} == {"mid/attn/attn": (2, 2, 2, 3, 6)}


def test_every_gives_the_plain_block():
    with once.every():
        assert once.once(attention.AttentionBlock, True) is attention.AttentionBlock
    assert once.once(attention.AttentionBlock) is not attention.AttentionBlock
    assert once.once(attention.AttentionBlock) is once.once(attention.AttentionBlock)


def left_and_right():
    """A U-Net of which the first attention sends what is left (x > 0) to token 0 and the rest to token 1."""
    network = unet.UNet(width=4, mults=(1,), attention=(1,), middle=0, heads=1, groups=1, blocks=1)
    cond = Cond(tokens=jnp.array([[[1.0], [-1.0], [0.0]]]), mask=jnp.array([[True, True, False]]))
    shapes = jax.eval_shape(network.init, KEY, jnp.zeros((1, 4, 6, 1)), jnp.zeros(1), cond)
    fill = lambda path, leaf: np.full(leaf.shape, path[-1].key == "scale", np.float32)  # noqa: E731
    params = jax.tree_util.tree_map_with_path(fill, shapes["params"])
    params["conv_in"]["kernel"][1, 1, 0] = [1, -1, 0, 0]
    block = params["down_0"]["attn_0"]
    block["proj_in"]["kernel"][..., :, :] = np.eye(4)
    block["block_0"]["cross_attn"]["q"]["kernel"][:] = np.eye(4)
    block["block_0"]["cross_attn"]["k"]["kernel"][0] = [9, -9, 0, 0]
    of = LatentDiffusion(network, None, codec.identity(), PATHS["rectified_flow"], targets.flow())
    return of, {"network": params}, cond


def test_a_word_that_acts_on_the_left():
    of, params, cond = left_and_right()
    sides = jnp.where(jnp.arange(6) < 3, 1.0, -1.0) * jnp.ones((1, 4, 1))
    way = jnp.stack(
        [s * sides[..., None] for s in (1.0, 2.0, -1.0)]
    )  # in the last step it is turned
    points = samplers.grid(of.path, 3)
    maps = np.asarray(heatmaps.of_steps(of, params, cond, points, way))
    assert maps.shape == (1, 4, 6, 3)
    np.testing.assert_allclose(maps.sum(-1), 1, rtol=1e-5)
    assert maps[..., 2].max() == 0
    # Of three layers two do not tell the tokens apart, and of three steps one is turned.
    one, two = heatmaps.of_words(maps[0], (("left", (0,)), ("both", (0, 1))))
    np.testing.assert_allclose(one[:, :3], (2 / 3 + 0.5 + 0.5) / 3, atol=1e-3)
    np.testing.assert_allclose(one[:, 3:], (1 / 3 + 0.5 + 0.5) / 3, atol=1e-3)
    np.testing.assert_allclose(two, 1, rtol=1e-5)
    sheet = heatmaps.sheet(np.zeros((8, 12, 3), np.uint8), maps[0], (("left", (0,)),))
    assert sheet.ndim == 3
    with pytest.raises(ValueError, match="no heat maps without tokens"):
        heatmaps.of_steps(of, params, Cond(), points, way)


def test_words_know_their_tokens(tmp_path):
    trained = tokenizer.train(["a red circle"] * 9 + ["a blue"], tmp_path / "t.json", vocab=40)
    text = "A  red, blue-ish circle"
    row = tokenizer.encode(trained, [text], 32)[0]
    words = tokenizer.words(trained, text, 32)
    assert [word for word, _ in words] == ["A", "red", ",", "blue", "-", "ish", "circle"]
    taken = [i for _, at in words for i in at]
    assert taken == list(range(1, 1 + len(taken)))
    assert (row[taken] > 3).sum() + (row[taken] == 1).sum() == len(taken)  # no marks, no padding
    assert trained.decode(row[list(words[1][1])]) == "red"
    for length in (2, 4, 6):
        row = tokenizer.encode(trained, [text], length)[0]
        cut = tokenizer.words(trained, text, length)
        assert [i for _, at in cut for i in at] == list(range(1, length - 1))
