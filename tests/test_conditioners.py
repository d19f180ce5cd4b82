import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import conditioners
from ldm_jax.models import clip
from ldm_jax.nn import embeddings
from ldm_jax.types import Cond
from tests.drawn import drawn

TOKENS = jnp.array([[2, 7, 8, 3, 0], [2, 9, 3, 0, 0], [2, 5, 6, 7, 3]])
BATCH = {
    "tokens": TOKENS,
    "label": jnp.array([0, 3, 1]),
    "style": jnp.arange(12.0).reshape(3, 4),
    "map": jax.random.randint(jax.random.key(1), (3, 8, 4, 1), 0, 5),
    "low": jax.random.normal(jax.random.key(2), (3, 4, 2, 3)),
    "tokens_2": TOKENS[::-1],
    "sizes": jnp.array([[512, 512, 0, 8, 64, 64], [48, 96, 3, 0, 64, 32], [1, 2, 3, 4, 5, 6.0]]),
}
SECOND = jnp.array([False, True, False])


def small_text(**kwargs):
    settings = dict(vocab=10, width=12, layers=1, length=5, heads=2, head_dim=4, null=(2, 3))
    return conditioners.Text(**settings | kwargs)


def encoder(**kwargs):
    settings = dict(vocab=10, width=12, layers=2, heads=2, hidden=16, length=5)
    return clip.TextEncoder(**settings | kwargs)


EMPTY = (2, 3, 0, 0, 0)
OTHER = (2, 3, 3, 3, 3)


def pair(**kwargs):
    encoders = (encoder(), encoder(width=8, projection=6, activation="gelu"))
    return conditioners.ClipPair(**dict(encoders=encoders, null=(EMPTY, OTHER)) | kwargs)


def run(module, drop=None, batch=BATCH):
    params = jax.jit(module.init)(jax.random.key(0), batch)
    return jax.jit(module.apply)(params, batch, drop), params


def apply(module, params, drop=None, batch=BATCH):
    return jax.jit(module.apply)(params, batch, drop)


def apply_drawn(module, drop=None, batch=BATCH):
    """Without compiling an initialiser."""
    params = drawn(module, batch)
    return apply(module, params, drop, batch), params


EVERY = {
    "text": small_text(mask_padding=True),
    "pooled": small_text(mask_padding=True, pool=True),
    "clip": conditioners.Clip(encoder(), EMPTY),
    "label": conditioners.Label(classes=4, width=6),
    "label_vector": conditioners.Label(classes=4, width=6, into="vector"),
    "vector": conditioners.Vector("style"),
    "projected": conditioners.Vector("style", width=7),
    "token": conditioners.Vector("style", into="tokens"),
    "map": conditioners.Spatial("map", classes=5, channels=2, factor=2),
    "low": conditioners.Spatial("low"),
}


@pytest.mark.parametrize("name", EVERY)
def test_a_dropped_row_forgets_its_field_and_the_others_keep_theirs(name):
    module = EVERY[name]
    (field,) = module.fields
    kept, params = run(module)
    dropped = apply(module, params, {field: SECOND})
    null = apply(module, params, conditioners.drop_all(module.fields, 3))
    for a, b, n in zip(*map(jax.tree.leaves, (kept, dropped, null)), strict=True):
        np.testing.assert_array_equal(b[0], a[0])
        np.testing.assert_array_equal(b[2], a[2])
        np.testing.assert_allclose(b[1], n[1], atol=1e-6)
        np.testing.assert_allclose(n, jnp.broadcast_to(n[:1], n.shape), atol=1e-6)
    # Not a condition that never saw the field.
    pairs = zip(jax.tree.leaves(kept), jax.tree.leaves(null), strict=True)
    assert any(np.abs(np.float32(a[1]) - np.float32(n[1])).max() > 1e-3 for a, n in pairs)
    # An entry for another field changes nothing.
    same = apply(module, params, {"else": jnp.ones(3, bool)})
    jax.tree.map(np.testing.assert_array_equal, same, kept)


@pytest.mark.parametrize("mask_padding", [False, True])
def test_a_dropped_text_is_the_empty_prompt(mask_padding):
    module = small_text(mask_padding=mask_padding)
    dropped, params = run(module, {"tokens": SECOND})
    empty = apply(module, params, batch={"tokens": TOKENS.at[1].set(jnp.array([2, 3, 0, 0, 0]))})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), dropped, empty)
    assert (dropped.mask is None) != mask_padding


def test_the_mask_covers_padding_but_never_a_whole_row():
    module = small_text(mask_padding=True, null=())
    cond, _ = run(module, {"tokens": SECOND})
    expected = [[1, 1, 1, 1, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]]
    np.testing.assert_array_equal(cond.mask, np.array(expected, bool))


def test_padding_with_a_mask_is_not_read_inside_the_encoder():
    module = small_text(mask_padding=True)
    cond, params = run(module)
    short = apply(module, params, batch={"tokens": TOKENS[:, :4]})
    np.testing.assert_allclose(cond.tokens[:2, :4], short.tokens[:2], atol=1e-5)


def test_label_is_a_row_of_a_table_with_one_more_row_than_classes():
    for into in ("tokens", "vector"):
        cond, params = run(conditioners.Label(classes=4, width=6, into=into), {"label": SECOND})
        table = params["params"]["embedding"]["embedding"]
        assert table.shape == (5, 6)
        value = cond.tokens[:, 0] if into == "tokens" else cond.vector
        np.testing.assert_array_equal(value, table[jnp.array([0, 4, 1])])


def test_labels_of_one_byte_reach_a_null_class_beyond_255():
    batch = {"label": jnp.array([0, 255, 1], jnp.uint8)}
    cond, params = run(conditioners.Label(classes=1000, width=2), {"label": SECOND}, batch)
    table = params["params"]["embedding"]["embedding"]
    assert table.shape[0] == 1001  # cin256-v2
    np.testing.assert_array_equal(cond.tokens[:, 0], table[jnp.array([0, 1000, 1])])


def test_vector_passes_or_projects():
    cond, params = run(conditioners.Vector("style"), {"style": SECOND})
    assert not jax.tree.leaves(params)
    np.testing.assert_array_equal(cond.vector, BATCH["style"] * jnp.array([[1.0], [0.0], [1.0]]))
    token, _ = run(conditioners.Vector("style", into="tokens"), {"style": SECOND})
    np.testing.assert_array_equal(token.tokens, cond.vector[:, None])
    assert token.vector is None
    cond, params = run(conditioners.Vector("style", width=7))
    kernel = params["params"]["project"]["kernel"]
    np.testing.assert_allclose(cond.vector, BATCH["style"] @ kernel, rtol=1e-5)


def test_spatial_counts_the_classes_of_each_block():
    cond, params = run(conditioners.Spatial("map", classes=5, factor=2))
    assert not jax.tree.leaves(params)
    classes = np.asarray(BATCH["map"])[..., 0]
    for i, j, k in ((0, 0, 0), (1, 3, 1), (2, 2, 1)):
        block = classes[i, 2 * j : 2 * j + 2, 2 * k : 2 * k + 2].ravel()
        np.testing.assert_allclose(cond.spatial[i, j, k], np.bincount(block, minlength=5) / 4)


def test_spatial_takes_the_nearest_and_a_sign_and_no_class_at_all():
    hole = jnp.zeros((2, 4, 4, 1)).at[0, 1:, 1:].set(1).at[1, 0, 2].set(1)
    module = conditioners.Spatial("hole", factor=2, nearest=True, signed=True)
    cond = module.apply({}, {"hole": hole})
    wanted = np.array([[[-1, -1], [-1, 1]], [[-1, 1], [-1, -1]]])
    np.testing.assert_array_equal(cond.spatial[..., 0], wanted)
    null = module.apply({}, {"hole": hole}, conditioners.drop_all(["hole"], 2))
    np.testing.assert_array_equal(null.spatial, 0)
    none = jnp.array([-1, 2])[None, :, None]
    cond = conditioners.Spatial("map", classes=3).apply({}, {"map": none})
    np.testing.assert_array_equal(cond.spatial[0], [[0, 0, 0], [0, 0, 1]])


def test_which_numbers_of_classes_a_conditioner_knows():
    every = conditioners.Combine(
        (
            conditioners.Label(classes=4, width=3),
            conditioners.Spatial("map", classes=5),
            conditioners.Spatial("low"),
            conditioners.Vector("style"),
        )
    )
    assert conditioners.counted(every) == {"label": range(4), "map": range(-1, 5)}
    assert conditioners.counted(None) == {}


def test_spatial_projects_without_a_bias_on_any_rank():
    """SpatialRescaler of semantic_synthesis: 182 -> 3 channels, no bias."""
    batch = {"map": jax.random.randint(jax.random.key(1), (1, 8, 8, 8, 1), 0, 182)}
    module = conditioners.Spatial("map", classes=182, channels=3, factor=4)
    cond, params = run(module, batch=batch)
    assert cond.spatial.shape == (1, 2, 2, 2, 3)
    assert [leaf.size for leaf in jax.tree.leaves(params)] == [182 * 3]
    null = apply(module, params, conditioners.drop_all(module.fields, 1), batch)
    np.testing.assert_array_equal(null.spatial, 0)


def test_combine_joins_what_its_parts_make():
    parts = (
        small_text(mask_padding=True),
        conditioners.Label(classes=4, width=12),
        conditioners.Label(classes=4, width=3, into="vector"),
        conditioners.Vector("style"),
        conditioners.Spatial("map", classes=5, factor=2),
        conditioners.Spatial("low", channels=2),
    )
    both = conditioners.Combine(parts)
    assert both.fields == ("tokens", "label", "style", "map", "low")
    drop = {"label": SECOND, "low": SECOND}
    cond, params = run(both, drop)
    assert set(params["params"]) == {"parts_0", "parts_1", "parts_2", "parts_5"}
    own = [
        part.apply({"params": params["params"].get(f"parts_{i}", {})}, BATCH, drop)
        for i, part in enumerate(parts)
    ]
    text, token, class_vector, style, seg, low = own

    def equal(a, *b):
        np.testing.assert_allclose(a, jnp.concatenate(b, -1), atol=1e-5)

    equal(cond.vector, class_vector.vector, style.vector)
    equal(cond.spatial, seg.spatial, low.spatial)
    equal(cond.tokens.swapaxes(1, 2), text.tokens.swapaxes(1, 2), token.tokens.swapaxes(1, 2))
    equal(cond.mask, text.mask, jnp.ones((3, 1), bool))


def test_combine_of_one_part_is_the_part():
    cond, _ = run(conditioners.Combine([conditioners.Vector("style")]))
    np.testing.assert_array_equal(cond.vector, BATCH["style"])
    assert isinstance(cond, Cond)
    assert cond.tokens is cond.mask is cond.spatial is None


def test_compute_dtype_leaves_parameters_float32():
    for module in (small_text(dtype=jnp.bfloat16), conditioners.Vector("style", 7, jnp.bfloat16)):
        cond, params = run(module)
        assert jax.tree.leaves(cond)[0].dtype == jnp.bfloat16
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}


# ---- CLIP ----------------------------------------------------------------------------------------


def encoded(module, params, ids, name, **kwargs):
    return module.apply({"params": params["params"][name]}, ids, **kwargs)


@pytest.mark.parametrize(("skip", "norm"), [(0, True), (1, True), (1, False)])
def test_clip_gives_the_states_of_its_encoder(skip, norm):
    module = conditioners.Clip(encoder(), EMPTY, skip=skip, norm=norm)
    cond, params = apply_drawn(module, {"tokens": SECOND})
    ids = TOKENS.at[1].set(jnp.array(EMPTY))
    expected = encoded(encoder(), params, ids, "encoder", skip=skip, norm=norm).tokens
    np.testing.assert_allclose(cond.tokens, expected, atol=1e-5)
    assert cond.vector is cond.mask is cond.spatial is None


def test_clip_passes_a_vector_beside_the_text():
    module = conditioners.Clip(encoder(), EMPTY, vector="style")
    assert module.fields == ("tokens", "style")
    cond, params = apply_drawn(module, {"style": SECOND})
    np.testing.assert_array_equal(cond.vector, BATCH["style"] * jnp.array([[1.0], [0.0], [1.0]]))
    alone = apply(conditioners.Clip(encoder(), EMPTY), params)
    np.testing.assert_allclose(cond.tokens, alone.tokens, atol=1e-6)


def test_clip_encodes_every_chunk_by_itself():
    module = conditioners.Clip(encoder(), EMPTY)
    one, params = apply_drawn(module)
    both = jnp.concatenate([TOKENS, TOKENS[::-1]], axis=1)
    two = apply(module, params, {"tokens": SECOND}, {"tokens": both})
    assert two.tokens.shape == (3, 10, 12)
    keep = jnp.array([0, 2])
    np.testing.assert_allclose(two.tokens[keep, :5], one.tokens[keep], atol=1e-5)
    np.testing.assert_allclose(two.tokens[keep, 5:], one.tokens[::-1][keep], atol=1e-5)
    null = apply(module, params, {"tokens": SECOND}).tokens[1]
    np.testing.assert_allclose(two.tokens[1], jnp.concatenate([null, null]), atol=1e-5)


def test_weights_of_tokens_are_those_of_the_batch_but_for_dropped_rows():
    module = conditioners.Clip(encoder(), EMPTY)
    both = {"tokens": jnp.concatenate([TOKENS, TOKENS[::-1]], axis=1)}
    weights = jnp.ones((3, 10)).at[:, 2].set(1.5).at[0, 7].set(0.5)
    plain, params = apply_drawn(module, {"tokens": SECOND}, both)
    cond = apply(module, params, {"tokens": SECOND}, both | {"tokens_weights": weights})
    np.testing.assert_allclose(cond.tokens[1], plain.tokens[1], atol=1e-6)
    expected = [clip.weigh(plain.tokens[:, s], weights[:, s]) for s in (slice(5), slice(5, 10))]
    keep = jnp.array([0, 2])
    np.testing.assert_allclose(cond.tokens[keep], jnp.concatenate(expected, 1)[keep], atol=1e-5)
    assert np.abs(cond.tokens[keep] - plain.tokens[keep]).max() > 0.01


def test_a_pair_joins_states_and_appends_sizes_to_the_pooled_text():
    module = pair()
    assert module.fields == ("tokens", "tokens_2", "sizes")
    cond, params = apply_drawn(module)
    first = encoded(module.encoders[0], params, TOKENS, "encoders_0", skip=1, norm=False)
    second = encoded(module.encoders[1], params, TOKENS[::-1], "encoders_1", skip=1, norm=False)
    expected = jnp.concatenate([first.tokens, second.tokens], -1)
    np.testing.assert_allclose(cond.tokens, expected, atol=1e-5)
    assert cond.vector.shape == (3, 6 + 6 * 256)
    np.testing.assert_allclose(cond.vector[:, :6], second.pooled, atol=1e-5)
    waves = cond.vector[:, 6:].reshape(3, 6, 256)
    for i in range(6):
        wave = embeddings.sinusoid(BATCH["sizes"][:, i], 256)
        np.testing.assert_allclose(waves[:, i], wave, atol=1e-6)


@pytest.mark.parametrize("zero_null", [False, True])
def test_a_pair_drops_each_text_by_itself_and_keeps_the_sizes(zero_null):
    module = pair(zero_null=zero_null)
    kept, params = apply_drawn(module)
    drop = {"tokens_2": SECOND, "sizes": SECOND}
    cond = apply(module, params, drop)
    np.testing.assert_allclose(cond.vector[:, 6:], kept.vector[:, 6:], atol=1e-6)
    np.testing.assert_allclose(cond.tokens[..., :12], kept.tokens[..., :12], atol=1e-5)
    np.testing.assert_allclose(cond.tokens[::2], kept.tokens[::2], atol=1e-5)
    null = encoded(module.encoders[1], params, jnp.array([OTHER]), "encoders_1", skip=1, norm=False)
    scale = 0 if zero_null else 1
    np.testing.assert_allclose(cond.tokens[1, :, 12:], scale * null.tokens[0], atol=1e-5)
    np.testing.assert_allclose(cond.vector[1, :6], scale * null.pooled[0], atol=1e-5)
    assert np.abs(null.pooled).max() > 0.01
    everything = apply(module, params, conditioners.drop_all(module.fields, 3))
    np.testing.assert_allclose(everything.tokens[0], everything.tokens[2], atol=1e-6)
    assert bool(jnp.all(everything.tokens == 0)) == zero_null


def test_the_refiner_reads_the_second_text_and_a_score_that_guidance_lowers():
    scores = BATCH["sizes"][:, :5]
    module = conditioners.ClipPair(
        (encoder(width=8, projection=6),), (OTHER,), null_sizes=(None, None, None, None, 2.5)
    )
    assert module.fields == ("tokens_2", "sizes")
    batch = {"tokens_2": TOKENS, "sizes": scores}
    cond, _ = apply_drawn(module, {"sizes": SECOND}, batch)
    assert cond.tokens.shape == (3, 5, 8)
    assert cond.vector.shape == (3, 6 + 5 * 256)
    expected = scores.at[1, 4].set(2.5)
    waves = embeddings.sinusoid(expected.reshape(-1), 256).reshape(3, -1)
    np.testing.assert_allclose(cond.vector[:, 6:], waves, atol=1e-5)


def test_a_pair_pools_the_first_chunk():
    module = pair()
    one, params = apply_drawn(module)
    longer = BATCH | {
        name: jnp.concatenate([BATCH[name], BATCH[name][::-1]], 1)
        for name in ("tokens", "tokens_2")
    }
    two = apply(module, params, None, longer)
    assert two.tokens.shape == (3, 10, 20)
    np.testing.assert_allclose(two.vector, one.vector, atol=1e-5)


# ---- drops ---------------------------------------------------------------------------------------


def test_drop_rates_are_met_and_independent():
    n = 20_000
    drops = conditioners.draw_drops(jax.random.key(0), ("a", "b", "c"), {"a": 0.1, "b": 0.5}, n)
    rates = {field: float(rows.mean()) for field, rows in drops.items()}
    assert abs(rates["a"] - 0.1) < 0.01  # 4.7 standard deviations
    assert abs(rates["b"] - 0.5) < 0.016
    assert rates["c"] == 0
    assert abs(float((drops["a"] & drops["b"]).mean()) - 0.05) < 0.007
    assert {rows.dtype for rows in drops.values()} == {jnp.dtype(bool)}


def test_rates_of_zero_and_one_are_exact():
    for rate in (0, 1, 0.0, 1.0):
        drops = conditioners.draw_drops(jax.random.key(0), ("a", "b"), rate, 64)
        assert all((rows == bool(rate)).all() for rows in drops.values())
    everything = conditioners.drop_all(("a", "b"), 64)
    jax.tree.map(np.testing.assert_array_equal, drops, everything)
    assert conditioners.draw_drops(jax.random.key(0), (), 0.5, 4) == {}


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rates", [{"c": 0.1}, {"a": 1.5}, -0.1, float("nan")])
def test_bad_rates_are_refused(rates):
    with pytest.raises(ValueError, match=r"reads \['a', 'b'\]|no probabilities"):
        conditioners.draw_drops(jax.random.key(0), ("a", "b"), rates, 4)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (small_text(field="caption"), r"Text reads the field 'caption', the batch has \['label'"),
        (small_text(null=(1,) * 6), "empty prompt has 6 tokens"),
        (conditioners.Clip(encoder(), (2, 3)), r"rows of 5 ids, the empty prompt 2"),
        (conditioners.Clip(encoder(), ()), "the empty prompt 0"),
        (conditioners.Clip(encoder(length=4), EMPTY), "4 positions"),
        (conditioners.Clip(encoder(), EMPTY, field="clip"), "Clip reads the field 'clip'"),
        (pair(null=(EMPTY,)), "2 encoders, 1 empty prompts"),
        (pair(null_sizes=(None, 2.5)), r"null_sizes=\(None, 2.5\) for 6 sizes"),
        (conditioners.Label(classes=4, width=6, into="spatial"), "choose 'tokens' or 'vector'"),
        (conditioners.Spatial("map"), "classes=None"),
        (conditioners.Spatial("low", classes=3), "float32"),
        (conditioners.Spatial("low", factor=4), r"factor=4 does not divide the grid \(4, 2\)"),
        (
            conditioners.Combine([small_text(), conditioners.Label(classes=4, width=6)]),
            r"tokens of shapes \[\(3, 5, 12\), \(3, 1, 6\)\]",
        ),
        (
            conditioners.Combine(
                [conditioners.Spatial("low"), conditioners.Spatial("map", classes=5)]
            ),
            "cannot be joined",
        ),
    ],
)
def test_bad_settings_are_named(module, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(module.init, jax.random.key(0), BATCH)


def test_a_drop_of_another_batch_size_is_refused():
    with pytest.raises(ValueError, match=r"drop\['style'\] has the shape \(1,\), the batch has 3"):
        conditioners.Vector("style").apply({}, BATCH, {"style": jnp.ones(1, bool)})


@pytest.mark.parametrize("masked", [False, True])
def test_the_pooled_vector_is_the_mean_of_the_tokens_that_count(masked):
    cond, _ = run(small_text(pool=True, mask_padding=masked))
    lengths = [4, 3, 5] if masked else [5, 5, 5]
    for vector, tokens, n in zip(cond.vector, cond.tokens, lengths, strict=True):
        np.testing.assert_allclose(vector, np.mean(tokens[:n], axis=0), atol=1e-6)


@pytest.mark.parametrize("std", [None, 1.0])
def test_embeddings_start_at_the_scale_that_is_asked_for(std):
    module = small_text(
        vocab=400, width=64, length=60, **({} if std is None else {"embedding_std": std})
    )
    encoder = run(module, batch={"tokens": TOKENS})[1]["params"]["encoder"]
    for leaf in (encoder["token"]["embedding"], encoder["position"]):
        assert leaf.std() == pytest.approx(0.02 if std is None else std, rel=0.05)


def test_weights_and_chunks_that_do_not_fit_are_told():
    init = pair().init
    short = BATCH | {"tokens_2_weights": jnp.ones((3, 4))}
    with pytest.raises(ValueError, match=r"'tokens_2_weights' has the shape \(3, 4\)"):
        jax.eval_shape(init, jax.random.key(0), short)
    longer = BATCH | {"tokens": jnp.concatenate([TOKENS, TOKENS], axis=1)}
    with pytest.raises(ValueError, match="same number of chunks"):
        jax.eval_shape(init, jax.random.key(0), longer)
