"""Ids of prompts against transformers' CLIPTokenizer on the same files."""

import numpy as np
import pytest

from ldm_jax.weights import prompts
from tests import clip_files

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

TEXTS = [
    "a photograph of an astronaut riding a horse",
    "",
    " ",
    "\t\n  \r\n",
    "  Two   SPACES\tand\na line ",
    "don't you'll they're I'VE it's 'tis 'dogs'",
    "4k, 1024x768 (masterpiece:1.2), [old], {x} #1 @you a_b a-b",
    "wow! amazing!! !!! !a!b!",
    "caf\u00e9 cafe\u0301 Z\u00dcRICH na\u00efve \u00c5ngstr\u00f6m \u212b",
    "\u0130stanbul STRASSE stra\u00dfe \u1e9e \u03a3\u03af\u03c3\u03c5\u03c6\u03bf\u03c2",
    "z\u0335\u0327\u0322a\u0336\u034dl\u0337g\u0338o\u0334",
    "\u732b\u306e\u7d75 \u041c\u043e\u0441\u043a\u0432\u0430 \ud55c\uad6d\uc5b4",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u0939\u093f\u0928\u094d\u0926\u0940",
    "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466",
    "\U0001f1e8\U0001f1ed \u2764\ufe0f\U0001f44d\U0001f3fd",
    "\x00a\x01b\x7fc\x85d\xa0e\u200bf\u2028g\ufeffh\ufffd",
    "\u00bd \u2460 \u0663 \uff11\uff12 \u2167 x\u00b2",
    "\u201ccurly\u201d \u2018quotes\u2019 \u2026 \u2014 fi \ufb01 schÃ¶n &amp; &#39;",
    "a <|endoftext|> b <|startoftext|>c<|ENDOFTEXT|><|StartOfText|> <|end",
    "</w> a</w> \u0120the ##x",
    "the cats of the sea, " * 30,
    "a" * 500,
    "\U0001f600" * 60,
    "!" * 100,
]
SETTINGS = [
    (pad, style)
    for style in ("old", "decoder", "bare", "whole", "resaved")
    for pad in (clip_files.END, "!")
    if (pad, style) != ("!", "bare")
]


def folder_of(tmp_path, pad, style):
    """Files of one style; "whole" adds a tokenizer.json, "resaved" is what transformers writes."""
    old = style in ("whole", "resaved")
    folder = clip_files.write(tmp_path / "theirs", pad, "old" if old else style)
    if old:
        theirs = transformers.CLIPTokenizer.from_pretrained(folder)
        theirs.save_pretrained(tmp_path / "resaved")
        if style == "resaved":
            return tmp_path / "resaved"
        whole = (tmp_path / "resaved" / "tokenizer.json").read_bytes()
        (folder / "tokenizer.json").write_bytes(whole)
    return folder


def same(ours, theirs, texts=TEXTS):
    expected = theirs(
        texts, padding="max_length", truncation=True, max_length=77, return_tensors="np"
    ).input_ids
    for text, a, b in zip(texts, ours(texts), expected, strict=True):
        assert a.tolist() == b.tolist(), text


@pytest.mark.parametrize(("pad", "style"), SETTINGS)
def test_ids_are_those_of_transformers(pad, style, tmp_path):
    folder = folder_of(tmp_path, pad, style)
    theirs = transformers.CLIPTokenizer.from_pretrained(folder)
    ours = prompts.load(folder)
    assert (ours.begin, ours.end, ours.pad) == (
        theirs.bos_token_id,
        theirs.eos_token_id,
        theirs.pad_token_id,
    )
    same(ours, theirs)


@pytest.mark.parametrize(("pad", "style"), SETTINGS)
def test_written_folders_with_placeholders_are_read_by_transformers(pad, style, tmp_path):
    folder = folder_of(tmp_path, pad, style)
    theirs = transformers.CLIPTokenizer.from_pretrained(folder)
    assert theirs.add_tokens(["<Cat-toy>", "<art>", "<art>_1"]) == 3
    ours = prompts.load(folder).add("<Cat-toy>").add("<art>", 2)
    ours.save(tmp_path / "ours")
    again = transformers.CLIPTokenizer.from_pretrained(tmp_path / "ours")
    texts = [*TEXTS, "a <Cat-toy>", "a<CAT-TOY>b, <cat-toy>s!", "<Cat-toy> " * 80]
    same(ours, theirs, texts)
    same(ours, again, texts)
    same(prompts.load(tmp_path / "ours"), again, texts)
    # What diffusers makes of a prompt before it tokenizes.
    for text in ("in the style of <art>.", "<ART> " * 70):
        replaced = text.lower().replace("<art>", "<art> <art>_1")
        expected = theirs([replaced], padding="max_length", truncation=True, max_length=77)
        np.testing.assert_array_equal(ours([text]), expected.input_ids)


def test_what_is_cut_is_what_diffusers_warns_of(tmp_path):
    folder = clip_files.write(tmp_path)
    theirs, ours = transformers.CLIPTokenizer.from_pretrained(folder), prompts.load(folder)
    long = 0
    for text in TEXTS:
        ids = theirs(text).input_ids
        cut = ours.cut(text)
        assert (cut is None) == (len(ids) <= 77)
        if cut is not None and "\U0001f600" not in text:  # an emoji's bytes are torn apart
            long += 1
            assert text.endswith(cut)
            decoded = theirs.decode(ids[76:-1])
            assert cut.lower().replace(" ", "") == decoded.replace(" ", "")
    assert long == 3
