import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import conditioners
from ldm_jax.types import Cond

TOKENS = jnp.array([[2, 7, 8, 3, 0], [2, 9, 3, 0, 0], [2, 5, 6, 7, 3]])
BATCH = {
    "tokens": TOKENS,
    "label": jnp.array([0, 3, 1]),
    "style": jnp.arange(12.0).reshape(3, 4),
    "map": jax.random.randint(jax.random.key(1), (3, 8, 4, 1), 0, 5),
    "low": jax.random.normal(jax.random.key(2), (3, 4, 2, 3)),
}
SECOND = jnp.array([False, True, False])


def small_text(**kwargs):
    settings = dict(vocab=10, width=12, layers=1, length=5, heads=2, head_dim=4, null=(2, 3))
    return conditioners.Text(**settings | kwargs)


def run(module, drop=None, batch=BATCH):
    params = jax.jit(module.init)(jax.random.key(0), batch)
    return jax.jit(module.apply)(params, batch, drop), params


def apply(module, params, drop=None, batch=BATCH):
    return jax.jit(module.apply)(params, batch, drop)


EVERY = {
    "text": small_text(mask_padding=True),
    "pooled": small_text(mask_padding=True, pool=True),
    "label": conditioners.Label(classes=4, width=6),
    "label_vector": conditioners.Label(classes=4, width=6, into="vector"),
    "vector": conditioners.Vector("style"),
    "projected": conditioners.Vector("style", width=7),
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
