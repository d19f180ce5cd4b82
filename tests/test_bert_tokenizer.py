import json

import numpy as np
import pytest

from ldm_jax.weights import prompts
from tests import bert_files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return bert_files.write(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return prompts.load(folder)


def read(tokenizer, text):
    """The pieces between begin and end."""
    row = tokenizer([text])[0].tolist()
    return [tokenizer.backend.id_to_token(i) for i in row[1 : row.index(tokenizer.end)]]


def test_a_row_is_cls_pieces_sep_padding(tokenizer):
    vocab = {piece: i for i, piece in enumerate(bert_files.pieces())}
    ids = tokenizer(["a cat", ""])
    assert ids.shape == (2, 77)
    begin, end = vocab["[CLS]"], vocab["[SEP]"]
    assert ids[0].tolist() == [begin, vocab["a"], vocab["cat"], end] + 73 * [0]
    assert ids[1].tolist() == [begin, end] + 75 * [0]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("A Painting, of CATS!", ["a", "painting", ",", "of", "cats", "!"]),
        ("painted 25", ["paint", "##ed", "2", "##5"]),
        ("Caf\u00e9 in Zu\u0308rich", ["cafe", "in", "zurich"]),
        ("cat日本house", ["cat", "日", "本", "house"]),
        ("the \u4e16 cat", ["the", "[UNK]", "cat"]),
        ("cat\u2603s", ["[UNK]"]),
        ("a\x00\u200bcat", ["a", "##c", "##a", "##t"]),
        (" the\t\n\u00a0cat ", ["the", "cat"]),
        ("[MASK] [mask]", ["[MASK]", "[", "m", "##a", "##s", "##k", "]"]),
        ("x" * 101, ["[UNK]"]),
    ],
)
def test_pieces(tokenizer, text, pieces):
    assert read(tokenizer, text) == pieces


def test_what_does_not_fit_is_cut(tokenizer):
    ids = tokenizer(["cat " * 80])[0]
    assert ids[-1] == tokenizer.end
    assert len(set(ids[1:-1].tolist())) == 1
    assert tokenizer.cut("cat " * 75) is None
    assert tokenizer.cut("cat " * 76) == "cat "


def test_the_case_and_accents_are_kept_where_the_config_says_so(tmp_path):
    cased = prompts.load(bert_files.write(tmp_path, do_lower_case=False))
    assert read(cased, "Cat cat é") == ["[UNK]", "cat", "é"]


def test_a_single_file_says_the_same_and_both_are_kept_to_the_byte(tokenizer, folder, tmp_path):
    tokenizer.save(tmp_path / "copy")
    assert {p.name: p.read_bytes() for p in (tmp_path / "copy").iterdir()} == {
        p.name: p.read_bytes() for p in folder.iterdir()
    }
    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / "tokenizer.json").write_text(tokenizer.backend.to_str())
    again = prompts.load(whole)
    texts = ["painted 25 caf\u00e9s", "", "cat \x85 [MASK]"]
    np.testing.assert_array_equal(again(texts), tokenizer(texts))


def test_a_placeholder_becomes_new_ids(tokenizer, tmp_path):
    more = tokenizer.add("<toy>", 2)
    size = len(bert_files.pieces())
    assert more(["a <toy> cat"])[0, 2:4].tolist() == [size, size + 1]
    more.save(tmp_path)
    again = prompts.load(tmp_path)
    np.testing.assert_array_equal(again(["a <toy> cat"]), more(["a <toy> cat"]))


def test_what_is_no_tokenizer_of_bert_is_told(tmp_path):
    folder = bert_files.write(tmp_path / "a")
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\ncat\n")
    with pytest.raises(ValueError, match=r"lacks the \['cls_token', 'sep_token'\]"):
        prompts.load(folder)
    folder = bert_files.write(tmp_path / "b")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    text = json.dumps(config | dict(tokenizer_class="T5Tokenizer"))
    (folder / "tokenizer_config.json").write_text(text)
    with pytest.raises(ValueError, match="T5Tokenizer"):
        prompts.load(folder)
    folder = bert_files.write(tmp_path / "c")
    (folder / "vocab.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="holds no CLIP or BERT tokenizer"):
        prompts.load(folder)
