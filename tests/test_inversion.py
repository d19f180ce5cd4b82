"""Textual inversion: the kinds of files, and new rows of the table."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from ldm_jax.models import clip
from ldm_jax.weights import files, inversion
from tests.drawn import drawn


def rows(n, d, dtype=np.float32):
    return np.random.default_rng(n * d).standard_normal((n, d)).astype(dtype)


def test_every_kind_of_file_gives_a_word_and_its_vectors(tmp_path):
    path = tmp_path / "learned_embeds.safetensors"
    files.write(path, {"<cat>": rows(3, 8, np.float16)})
    word = inversion.read(files.read(path))
    assert word.token == "<cat>"
    assert word.vectors["text_encoder"].dtype == np.float16
    np.testing.assert_array_equal(word.vectors["text_encoder"], rows(3, 8, np.float16))
    one = inversion.read({"<cat>": rows(1, 8)[0]}, "<dog>")
    assert one.token == "<dog>"
    np.testing.assert_array_equal(one.vectors["text_encoder"], rows(1, 8))
    for inner in (
        {"string_to_token": {"*": 265}, "string_to_param": {"*": rows(2, 8)}, "name": "x"},
        {"*": rows(2, 8)},
        {"emb_params": rows(2, 8)},
    ):
        word = inversion.read(inner, "style")
        assert word.token == "style"
        np.testing.assert_array_equal(word.vectors["text_encoder"], rows(2, 8))
        with pytest.raises(ValueError, match="does not say which word it is for"):
            inversion.read(inner)
    word = inversion.read({"clip_g": rows(2, 12), "clip_l": rows(2, 8)}, "style")
    assert {c: x.shape for c, x in word.vectors.items()} == {
        "text_encoder": (2, 8),
        "text_encoder_2": (2, 12),
    }


def test_other_files_are_told():
    with pytest.raises(ValueError, match=r"holds \['a', 'b'\], where the vectors of one word"):
        inversion.read({"a": rows(1, 2), "b": rows(1, 2)}, "x")
    with pytest.raises(ValueError, match="no file of textual inversion"):
        inversion.read({}, "x")
    with pytest.raises(ValueError, match=r"'text_encoder': \(2, 3, 4\)"):
        inversion.read({"<cat>": np.zeros((2, 3, 4))})
    with pytest.raises(ValueError, match=r"\(2, 8\).*\(3, 12\)"):
        inversion.read({"clip_g": rows(3, 12), "clip_l": rows(2, 8)}, "x")


def test_new_words_are_read_and_the_old_ones_stay():
    encoder = clip.TextEncoder(vocab=20, width=8, layers=1, heads=2, hidden=16, length=6, eos=19)
    ids = jnp.array([[0, 5, 7, 19, 19, 19]])
    params = drawn(encoder, ids)["params"]
    table = params["token"]["embedding"].astype(jnp.bfloat16)
    vectors = rows(2, 8, ml_dtypes.bfloat16)
    larger = inversion.add(table, vectors)
    assert (larger.shape, larger.dtype) == ((22, 8), jnp.bfloat16)
    np.testing.assert_array_equal(larger[:20], table)
    np.testing.assert_array_equal(larger[20:], vectors)

    vectors = np.asarray(params["token"]["embedding"])[
        [7, 5]
    ]  # so that the new words mean old ones
    larger = params | {"token": {"embedding": inversion.add(params["token"]["embedding"], vectors)}}
    wider = encoder.clone(vocab=22)
    before = encoder.apply({"params": params}, ids)
    jax.tree.map(
        np.testing.assert_array_equal,
        wider.apply({"params": larger}, jnp.array([[0, 21, 20, 19, 19, 19]])),
        before,
    )


def test_vectors_of_another_width_are_told():
    for wrong in (rows(2, 12), rows(2, 8)[0]):
        with pytest.raises(ValueError, match="a width of 8; they were learnt with another"):
            inversion.add(jnp.zeros((20, 8)), wrong)
