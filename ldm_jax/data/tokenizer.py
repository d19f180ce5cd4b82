"""A vocabulary learnt from the captions, and text as rows of token numbers.

Text is lower-cased, split at spaces and punctuation, and words are split further into pieces of the
vocabulary (WordPiece or byte-pair encoding, by the `tokenizers` library). A row is `[BOS] pieces
[EOS] [PAD] ...`; the empty prompt is `[BOS] [EOS] [PAD] ...`. The file `tokenizer.json` holds
everything; nothing else is needed to read text again.
"""

import collections
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from absl import logging
from jaxtyping import Int
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

PAD, UNK, BOS, EOS = SPECIAL = ("[PAD]", "[UNK]", "[BOS]", "[EOS]")  # numbers 0 to 3
MARK = {"wordpiece": "##{}", "bpe": "{}</w>"}  # of a piece within a word, or at the end of one


def train(
    captions: Iterable[str],
    path: str | os.PathLike,
    *,
    vocab: int = 2000,
    kind: str = "wordpiece",
) -> tokenizers.Tokenizer:
    """Learn at most `vocab` pieces and write them to the file `path`; same captions, same file.

    Args:
      kind: "wordpiece" or "bpe".

    Raises:
      ValueError: no caption, or an unknown kind.
    """
    if kind not in ("wordpiece", "bpe"):
        raise ValueError(f"unknown kind of tokenizer {kind!r}; choose 'wordpiece' or 'bpe'")
    blank = _pieces(kind, {})
    words = collections.Counter()
    for caption, count in collections.Counter(captions).items():
        normal = blank.normalizer.normalize_str(caption)
        for word, _ in blank.pre_tokenizer.pre_tokenize_str(normal):
            words[word] += count
    if not words:
        raise ValueError("no captions to learn a vocabulary from; give a source that has captions")
    # The library numbers the letters in the order of a random hash and breaks ties by number. Given
    # to it beforehand, as special pieces of this trainer alone, they always get the same numbers.
    letters = sorted({letter for word in words for letter in word})
    marked = [MARK[kind].format(letter) for letter in letters]
    options = dict(
        vocab_size=vocab, special_tokens=[*SPECIAL, *letters, *marked], show_progress=False
    )
    if kind == "wordpiece":
        trainer = trainers.WordPieceTrainer(**options)
    else:
        trainer = trainers.BpeTrainer(**options, end_of_word_suffix="</w>")
    blank.train_from_iterator(
        (f"{word} " * count for word, count in words.items()), trainer, length=len(words)
    )
    tokenizer = _pieces(kind, json.loads(blank.to_str())["model"])
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}",
        special_tokens=[(BOS, SPECIAL.index(BOS)), (EOS, SPECIAL.index(EOS))],
    )
    _write(Path(path), tokenizer.to_str(pretty=True))
    return tokenizer


def load(path: str | os.PathLike) -> tokenizers.Tokenizer:
    """Read a `tokenizer.json`.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file is not a tokenizer, or has no `[PAD]`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no tokenizer {str(path)!r}; train one with tokenizer.train"
        )
    try:
        tokenizer = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises a plain Exception
        raise ValueError(
            f"{str(path)!r} is not a tokenizer of the tokenizers library: {error}"
        ) from error
    if tokenizer.token_to_id(PAD) is None:
        raise ValueError(f"the tokenizer {str(path)!r} has no piece {PAD} to fill rows with")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def encode(
    tokenizer: tokenizers.Tokenizer, texts: Sequence[str], length: int
) -> Int[np.ndarray, "b {length}"]:
    """Texts as int32 rows of `length` token numbers; a longer text is cut, and that is logged.

    Raises:
      ValueError: `length` has no room for the marks of begin and end.
    """
    end = tokenizer.encode("").ids
    if length < max(len(end), 1):
        raise ValueError(f"length={length} has no room for the {len(end)} marks of begin and end")
    rows = np.full((len(texts), length), tokenizer.token_to_id(PAD), np.int32)
    too_long = []
    for row, text, encoding in zip(rows, texts, tokenizer.encode_batch(list(texts)), strict=True):
        ids = encoding.ids
        if len(ids) > length:
            too_long.append((len(ids), text))
            ids = ids[: length - len(end[-1:])] + end[-1:]
        row[: len(ids)] = ids
    if too_long:
        longest, text = max(too_long)
        logging.log_first_n(
            logging.WARNING,
            "%d of %d captions were cut to %d tokens; the longest has %d: %.80r (said 5 times)",
            5,
            *(len(too_long), len(texts), length, longest, text),
        )
    return rows


def words(
    tokenizer: tokenizers.Tokenizer, text: str, length: int
) -> list[tuple[str, tuple[int, ...]]]:
    """The words of a text in order, as they are written, each with the positions of its tokens in the row of `encode`.

    Words that the row has no room for are not among them.
    """
    found = tokenizer.encode(text)
    room = length if len(found.ids) <= length else length - 1  # a cut row ends with [EOS]
    at, spans = {}, {}
    for position, (word, span) in enumerate(zip(found.word_ids, found.offsets, strict=True)):
        if word is not None and position < room:
            at.setdefault(word, []).append(position)
            spans.setdefault(word, []).append(span)
    return [
        (text[spans[word][0][0] : spans[word][-1][1]], tuple(positions))
        for word, positions in at.items()
    ]


def null_ids(tokenizer: tokenizers.Tokenizer, length: int) -> Int[np.ndarray, " {length}"]:
    """The row of the empty prompt."""
    return encode(tokenizer, [""], length)[0]


def _pieces(kind: str, learnt: dict) -> tokenizers.Tokenizer:
    """A tokenizer of lower-case words with the vocabulary of a trained model, or with none."""
    vocab = learnt.get("vocab", {})
    if kind == "wordpiece":
        tokenizer = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token=UNK))
        tokenizer.decoder = decoders.WordPiece()
    else:
        merges = [tuple(pair) for pair in learnt.get("merges", [])]
        tokenizer = tokenizers.Tokenizer(
            models.BPE(vocab, merges, unk_token=UNK, end_of_word_suffix="</w>")
        )
        tokenizer.decoder = decoders.BPEDecoder()
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # spaces and punctuation
    return tokenizer


def _write(path: Path, text: str) -> None:
    """At once or not at all: a killed run leaves no half file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.{os.getpid()}")
    half.write_text(text, encoding="utf-8")
    os.replace(half, path)
