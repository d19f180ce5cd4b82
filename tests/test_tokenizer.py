import os
import subprocess
import sys

import numpy as np
import pytest
from absl import logging

from ldm_jax.data import tokenizer

CAPTIONS = [
    f"a {size} {colour} {shape}, {place}"
    for size in ("small", "large")
    for colour in ("red", "green", "blue")
    for shape in ("circle", "square", "triangle")
    for place in ("on the left", "on the right", "at the top")
]


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_text_comes_back_in_lower_case(tmp_path, kind):
    trained = tokenizer.train(CAPTIONS, tmp_path / "new" / "tokenizer.json", vocab=200, kind=kind)
    ids = tokenizer.encode(trained, ["A small RED circle, on the left"], 20)
    assert ids.shape == (1, 20)
    assert ids.dtype == np.int32
    assert ids[0, 0] == 2
    end = int(np.argmax(ids[0] == 3))
    assert 0 < end < 20
    assert (ids[0, end + 1 :] == 0).all()
    text = trained.decode(ids[0].tolist(), skip_special_tokens=True)
    assert text.replace(" ,", ",") == "a small red circle, on the left"
    assert [trained.id_to_token(i) for i in range(4)] == list(tokenizer.SPECIAL)
    assert trained.get_vocab_size() <= 200


def test_unseen_letters_are_unknown_and_unseen_words_are_pieces(tmp_path):
    trained = tokenizer.train(CAPTIONS, tmp_path / "t.json")
    unknown, pieces = tokenizer.encode(trained, ["漢", "redgreen"], 16)
    assert unknown[:3].tolist() == [2, 1, 3]
    assert 1 not in pieces
    assert (pieces != 0).sum() > 3


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_the_same_captions_give_the_same_file(tmp_path, kind):
    tokenizer.train(CAPTIONS, tmp_path / "a.json", vocab=120, kind=kind)
    tokenizer.train(iter(CAPTIONS), tmp_path / "b.json", vocab=120, kind=kind)
    first = (tmp_path / "a.json").read_bytes()
    assert first == (tmp_path / "b.json").read_bytes()
    code = (
        f"from ldm_jax.data import tokenizer; tokenizer.train({CAPTIONS!r}, "
        f"{str(tmp_path / 'c.json')!r}, vocab=120, kind={kind!r})"
    )
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert first == (tmp_path / "c.json").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json", "c.json"]


def test_loading_gives_the_same_numbers(tmp_path):
    trained = tokenizer.train(CAPTIONS, tmp_path / "t.json")
    loaded = tokenizer.load(tmp_path / "t.json")
    np.testing.assert_array_equal(
        tokenizer.encode(trained, CAPTIONS, 16), tokenizer.encode(loaded, CAPTIONS, 16)
    )


def test_too_long_a_text_is_cut_keeps_its_end_and_is_logged(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(
        logging, "log_first_n", lambda level, text, n, *args: said.append(text % args)
    )
    trained = tokenizer.train(CAPTIONS, tmp_path / "t.json")
    whole = tokenizer.encode(trained, ["a red circle on the left", "red"], 16)
    assert not said
    cut = tokenizer.encode(trained, ["a red circle on the left", "red"], 4)
    assert cut[0].tolist() == [*whole[0, :3].tolist(), 3]
    assert cut[1].tolist() == whole[1, :4].tolist()
    assert len(said) == 1
    assert "1 of 2 captions were cut to 4 tokens; the longest has 8" in said[0]


def test_the_empty_prompt(tmp_path):
    trained = tokenizer.train(CAPTIONS, tmp_path / "t.json")
    assert tokenizer.null_ids(trained, 5).tolist() == [2, 3, 0, 0, 0]
    with pytest.raises(ValueError, match="no room"):
        tokenizer.null_ids(trained, 1)


def test_bad_input_is_named(tmp_path):
    with pytest.raises(ValueError, match="no captions"):
        tokenizer.train([], tmp_path / "t.json")
    with pytest.raises(ValueError, match="'wordpiece' or 'bpe'"):
        tokenizer.train(CAPTIONS, tmp_path / "t.json", kind="unigram")
    with pytest.raises(FileNotFoundError, match="there is no tokenizer"):
        tokenizer.load(tmp_path / "t.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match="not a tokenizer"):
        tokenizer.load(tmp_path / "bad.json")
