import json
import subprocess
import sys

import numpy as np
import pytest

from ldm_jax.weights import prompts
from tests import clip_files

TEXT = "A photograph of the astronaut's 25 horses, don't you see?"
LONG = "the cats by the sea, " * 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return clip_files.write(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return prompts.load(folder)


def pieces(tokenizer, ids):
    return [tokenizer.backend.id_to_token(int(i)) for i in ids]


def inside(tokenizer, row):
    """The pieces of a row between its begin and its first end."""
    row = row.tolist()
    return pieces(tokenizer, row[1 : row.index(tokenizer.end)])


def test_a_row_is_begin_pieces_end_padding(tokenizer):
    ids = tokenizer([TEXT, "", "cats", LONG])
    assert ids.shape == (4, 77)
    assert ids.dtype == np.int32
    assert tokenizer.end == ids.max() == tokenizer.begin + 1
    np.testing.assert_array_equal(ids[:, 0], tokenizer.begin)
    np.testing.assert_array_equal(ids[1, 1:], tokenizer.end)
    assert ids[3, -1] == tokenizer.end
    assert (ids[3, 1:-1] < tokenizer.begin).all()
    found = "".join(inside(tokenizer, ids[0])).replace("</w>", " ").split()
    words = "a photograph of the astronaut 's 2 5 horses , don 't you see ?"
    assert found == words.split()
    # Learnt merges are used: fewer pieces than letters.
    assert len(inside(tokenizer, ids[0])) < 0.8 * len(TEXT)
    np.testing.assert_array_equal(tokenizer([TEXT])[0], ids[0])
    assert tokenizer([]).shape == (0, 77)


def test_words_are_where_their_tokens_are(tokenizer):
    words = tokenizer.words(TEXT)
    assert [word for word, _ in words] == [
        *("A", "photograph", "of", "the", "astronaut's", "25", "horses", "don't", "you", "see")
    ]
    row = tokenizer([TEXT])[0].tolist()
    taken = [position for _, positions in words for position in positions]
    assert taken == sorted(set(taken))
    for word, positions in words:
        spelled = "".join(pieces(tokenizer, [row[i] for i in positions])).replace("</w>", "")
        assert spelled == word.lower()
    # What the row has no room for is not there, and signs are no words.
    assert max(tokenizer.words(LONG)[-1][1]) <= 75
    assert tokenizer.words(" -- ! ") == []


def test_every_byte_can_be_read_back(tokenizer):
    text = "猫の絵 \U0001f468‍\U0001f469 café"
    letters = dict(zip(clip_files.alphabet(), clip_files_bytes(), strict=True))
    row = inside(tokenizer, tokenizer([text])[0])
    raw = bytes(letters[x] for piece in row for x in piece.removesuffix("</w>"))
    assert raw.decode() == text.replace(" ", "")


def clip_files_bytes():
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [*shown, *(b for b in range(256) if b not in shown)]


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("  Two \t\n words ", "two words"),
        ("CAFE\u0301", "caf\u00e9"),
        ("it's", "it 's"),
        ("2024", "2 0 2 4"),
        ("sea,(red)", "sea ,( red )"),
        (" \n", ""),
    ],
)
def test_texts_that_are_the_same_to_it(tokenizer, a, b):
    np.testing.assert_array_equal(*tokenizer([a, b]))


def test_padding_may_be_another_token(tmp_path):
    for style in ("old", "decoder"):
        tokenizer = prompts.load(clip_files.write(tmp_path / style, pad="!", style=style))
        assert tokenizer.pad == 0
        ids = tokenizer(["sea!!", ""])
        assert ids[1].tolist() == [tokenizer.begin, tokenizer.end] + 75 * [0]
        assert inside(tokenizer, ids[0])[-2:] == ["!", "!"]
        assert inside(tokenizer, ids[0])[-3].endswith("</w>")


def test_text_from_the_first_piece_that_does_not_fit_is_cut(tokenizer):
    assert tokenizer.cut(TEXT) is None
    assert tokenizer.cut("a " * 75) is None
    assert tokenizer.cut("a " * 76) == "a "
    cut = tokenizer.cut(LONG)
    assert LONG.endswith(cut)
    np.testing.assert_array_equal(tokenizer([LONG[: -len(cut)]]), tokenizer([LONG]))
    assert len(tokenizer.cut(LONG, chunks=2)) < len(cut)
    assert tokenizer.cut(LONG, chunks=9) is None
    assert tokenizer.cut("(the:1.2) [sea]" + "!a" * 80, weighted=True).startswith(("!", "a"))
    assert "(" not in tokenizer.cut("((b)) " * 90, weighted=True)


def test_long_prompts_fill_several_chunks(tokenizer):
    ids = tokenizer([LONG, "sea", ""], chunks=None)
    count = ids.shape[1] // 77
    assert count > 2
    chunks = ids.reshape(3, count, 77)
    np.testing.assert_array_equal(chunks[..., 0], tokenizer.begin)
    np.testing.assert_array_equal(chunks[0, :-1, -1], tokenizer.end)
    np.testing.assert_array_equal(chunks[:, 0], tokenizer([LONG, "sea", ""]))
    empty = tokenizer([""])[0]
    for row in (*chunks[1, 1:], *chunks[2]):
        np.testing.assert_array_equal(row, empty)
    together = [piece for row in chunks[0] for piece in inside(tokenizer, row)]
    whole = tokenizer.backend.encode(LONG, add_special_tokens=False).tokens
    assert together == whole
    np.testing.assert_array_equal(tokenizer([LONG], chunks=2), ids[:1, : 2 * 77])
    np.testing.assert_array_equal(tokenizer(["sea"], chunks=None), tokenizer(["sea"]))
    assert tokenizer(["sea"], chunks=4).shape == (1, 4 * 77)


# ---- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", [("", 1)]),
        ("a b", [("a b", 1)]),
        ("(a)", [("a", 1.1)]),
        ("a (b) c", [("a ", 1), ("b", 1.1), (" c", 1)]),
        ("(a:1.3)b", [("a", 1.3), ("b", 1)]),
        ("(a: 0.5 )", [("a", 0.5)]),
        ("(a:-1)(b:.5)", [("a", -1), ("b", 0.5)]),
        ("[a]", [("a", 1 / 1.1)]),
        ("[a:0.5]", [("a:0.5", 1 / 1.1)]),
        ("((a))", [("a", 1.1**2)]),
        ("(a (b:2) [c])", [("a ", 1.1), ("b", 2.2), (" ", 1.1), ("c", 1)]),
        ("([a:1.5])", [("a:1.5", 1)]),
        (r"\(a\) \[b\] \\c \d", [(r"(a) [b] \c d", 1)]),
        (r"(a\)) \(b:2)", [("a)", 1.1), (" (b:2)", 1)]),
        ("(a [b) c]", [("a ", 1.1), ("b", 1), (" c", 1 / 1.1)]),
        ("\\", [("", 1)]),
        ("(a", [("a", 1.1)]),
        ("[(a", [("a", 1)]),
        ("a) b] c:2) d", [("a) b] c:2) d", 1)]),
        ("(a] b)", [("a] b", 1.1)]),
        ("(a:b:1.2)", [("a:b", 1.2)]),
        ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
        ("()[]", [("", 1)]),
        ("a\n(b)", [("a\n", 1), ("b", 1.1)]),
    ],
)
def test_brackets(text, parts):
    found = prompts.parse(text)
    assert [part for part, _ in found] == [part for part, _ in parts]
    np.testing.assert_allclose([w for _, w in found], [w for _, w in parts], rtol=1e-9)


def test_tokens_have_the_weight_of_their_part(tokenizer):
    ids, weights = tokenizer.weighted(["the (red sea:1.5) by [cats]", "sea", "(sea:2) " * 90])
    assert ids.dtype == np.int32
    assert weights.dtype == np.float32
    np.testing.assert_array_equal(ids[:2], tokenizer(["the red sea by cats", "sea"]))
    np.testing.assert_array_equal(weights[1], 1)
    of = {}
    for piece, weight in zip(inside(tokenizer, ids[0]), weights[0, 1:], strict=False):
        of.setdefault(float(weight), []).append(piece.removesuffix("</w>"))
    words = {weight: "".join(found) for weight, found in of.items()}
    np.testing.assert_allclose(list(words), [1, 1.5, 1 / 1.1], rtol=1e-6)
    assert list(words.values()) == ["theby", "redsea", "cats"]
    n = len(inside(tokenizer, ids[0]))
    np.testing.assert_array_equal(weights[0, [0, *range(n + 1, 77)]], 1)
    both, weights = tokenizer.weighted(["(sea:2) " * 90], chunks=None)
    chunks = both.reshape(-1, 77)
    assert len(chunks) > 1
    real = (both != tokenizer.begin) & (both != tokenizer.end)
    np.testing.assert_array_equal(weights, np.where(real, 2, 1))


# ---- placeholders --------------------------------------------------------------------------------


def test_a_placeholder_becomes_new_ids(tokenizer):
    size = tokenizer.backend.get_vocab_size()
    more = tokenizer.add("<toy>").add("<art>", 3)
    toy, art = size, [size + 1, size + 2, size + 3]
    row = more(["the <toy> by <art>, <ART>"])[0].tolist()
    assert row.count(toy) == 1
    at = row.index(art[0])
    assert row[at : at + 3] == art
    assert [i for i in row if i >= size] == [toy, *art, *art]
    # Neither the old one nor other texts change.
    assert (tokenizer(["<toy>"]) < size).all()
    np.testing.assert_array_equal(more([TEXT, LONG]), tokenizer([TEXT, LONG]))
    # Three ids take the room of three.
    assert more.cut("<art> " * 25) is None
    assert more.cut("<art> " * 26) is not None
    ids, weights = more.weighted(["(<art>:1.4)"])
    assert ids[0, 1:4].tolist() == art
    np.testing.assert_allclose(weights[0, :5], [1, 1.4, 1.4, 1.4, 1], rtol=1e-6)


@pytest.mark.parametrize("style", ["old", "decoder", "bare"])
def test_folders_are_kept_to_the_byte_and_with_placeholders_read_again(style, tmp_path):
    folder = clip_files.write(tmp_path / "a", style=style)
    tokenizer = prompts.load(folder)
    tokenizer.save(tmp_path / "b")
    assert {p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()} == {
        p.name: p.read_bytes() for p in folder.iterdir()
    }
    more = tokenizer.add("<toy>").add("<art>", 2)
    more.save(tmp_path / "c")
    again = prompts.load(tmp_path / "c")
    assert again.vectors == more.vectors
    texts = [TEXT, "<art> by <toy>"]
    np.testing.assert_array_equal(again(texts), more(texts))
    written = {p.name for p in (tmp_path / "c").iterdir()}
    more_files = set() if style == "decoder" else {"added_tokens.json"}
    assert written == {p.name for p in folder.iterdir()} | more_files


# ---- bad input -----------------------------------------------------------------------------------


def test_what_is_no_folder_of_clip_is_told(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json, nor vocab\.json"):
        prompts.load(tmp_path)
    with pytest.raises(ValueError, match="length=2"):
        prompts.load(folder, length=2)
    other = clip_files.write(tmp_path / "other")
    config = json.loads((other / "tokenizer_config.json").read_text())
    text = json.dumps(config | {"tokenizer_class": "T5Tokenizer"})
    (other / "tokenizer_config.json").write_text(text)
    with pytest.raises(ValueError, match="T5Tokenizer"):
        prompts.load(other)
    bare = clip_files.write(tmp_path / "bare", style="bare")
    (bare / "vocab.json").write_text('{"a": 0}')
    with pytest.raises(ValueError, match=r"lacks \['<\|startoftext\|>'"):
        prompts.load(bare)
    (bare / "vocab.json").write_text('{"a": 0, "<|startoftext|>": 1, "<|endoftext|>": 2}')
    with pytest.raises(ValueError, match="merges do not fit"):
        prompts.load(bare)
    (bare / "vocab.json").write_text("{")
    with pytest.raises(ValueError, match="holds no CLIP or BERT tokenizer"):
        prompts.load(bare)
    (bare / "tokenizer.json").write_text('{"model": {"vocab": []}}')
    with pytest.raises(ValueError, match="holds no CLIP or BERT tokenizer"):
        prompts.load(bare)
    gap = clip_files.write(tmp_path / "gap")
    (gap / "added_tokens.json").write_text('{"<toy>": 5000}')
    with pytest.raises(ValueError, match=r"'<toy>': 5000.* do not follow"):
        prompts.load(gap)


def test_bad_arguments_are_told(tokenizer):
    with pytest.raises(ValueError, match="put it in a list"):
        tokenizer("one text")
    with pytest.raises(ValueError, match="chunks=0"):
        tokenizer(["a"], chunks=0)
    for token, count in (("<a b>", 1), ("", 1), ("<a>", 0)):
        with pytest.raises(ValueError, match="cannot be added"):
            tokenizer.add(token, count)
    for token in ("<|endoftext|>", "a</w>"):
        with pytest.raises(ValueError, match="knows"):
            tokenizer.add(token)
    with pytest.raises(ValueError, match=r"knows \['<art>'\]"):
        tokenizer.add("<art>").add("<art>", 2)


def test_no_jax_is_needed():
    code = "import sys, ldm_jax.weights.prompts; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
