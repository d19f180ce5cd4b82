"""Prompts as rows of token numbers, by the tokenizers that are published beside text encoders: CLIP's and BERT's.

A row is [begin, at most length - 2 pieces of the text, end, padding ...]; the pieces are byte pairs of lower-case words
(CLIP, see `byte_pairs`) or word pieces (BERT, see `word_pieces`). CLIP's padding, "<|endoftext|>" or "!" by the
folder's files, is a special token like begin and end, and written in a prompt it is that token: a prompt's "!" is
padding's id 0 for Stable Diffusion 2 and the second tokenizer of XL, as it is there.

Text with weights follows AUTOMATIC1111's web interface: "(a)" weighs 1.1, "[a]" 1/1.1, "(a:1.3)" 1.3. Brackets nest,
and one that is never closed holds to the end. "\\(" is a bracket without meaning; other backslashes vanish. Long
prompts go on in further chunks after length - 2 pieces each; unlike there, no comma and no word BREAK ends a chunk.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
from absl import logging
from jaxtyping import Float, Int

from ldm_jax.weights import byte_pairs, tokens, word_pieces


class Piece(NamedTuple):
    """A token of a prompt, and where in the prompt it begins."""

    id: int
    weight: float
    part: int
    start: int


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Texts to ids; made by `load`."""

    backend: tokenizers.Tokenizer = dataclasses.field(repr=False)
    begin: int
    end: int
    pad: int
    vectors: Mapping[int, tuple[int, ...]]  # placeholders that stand for several ids
    files: Mapping[str, bytes] = dataclasses.field(repr=False)  # what `save` writes
    length: int = 77

    def __call__(self, texts: Sequence[str], chunks: int | None = 1) -> Int[np.ndarray, "b n"]:
        """One row of `chunks * length` int32 ids a text; what does not fit is left out (`cut` says what).

        Every chunk has its begin and end. None for chunks gives all texts as many as the longest one needs.
        """
        return self._rows([[(text, 1.0)] for text in _several(texts)], chunks)[0]

    def weighted(
        self, texts: Sequence[str], chunks: int | None = 1
    ) -> tuple[Int[np.ndarray, "b n"], Float[np.ndarray, "b n"]]:
        """The ids of texts with brackets, read by `parse`, and each token's weight; begin, end and padding have 1."""
        return self._rows([parse(text) for text in _several(texts)], chunks)

    def cut(self, text: str, chunks: int = 1, weighted: bool = False) -> str | None:
        """The end of the text that does not fit into so many chunks; None if all does."""
        parts = parse(text) if weighted else [(text, 1.0)]
        over = self._pieces(parts)[chunks * (self.length - 2) :]
        if not over:
            return None
        _, _, part, start = over[0]
        return parts[part][0][start:] + "".join(text for text, _ in parts[part + 1 :])

    def words(self, text: str) -> list[tuple[str, tuple[int, ...]]]:
        """The words of a text in order, as they are written, each with the positions of its tokens in the text's row.

        A word is what white space divides, without signs at its ends that are tokens of their own. Words that the row
        has no room for are not among them, nor are signs alone.
        """
        spans = list(enumerate(self._spans(text)[: self.length - 2], 1))
        found = []
        for start, end in (match.span() for match in re.finditer(r"\S+", text)):
            parts = [(at, span) for at, span in spans if start <= span[0] < end]
            while parts and not _spoken(text, parts[0][1]):
                del parts[0]
            while parts and not _spoken(text, parts[-1][1]):
                del parts[-1]
            if parts:
                word = text[parts[0][1][0] : parts[-1][1][1]]
                found.append((word, tuple(at for at, _ in parts)))
        return found

    def add(self, token: str, count: int = 1) -> "Tokenizer":
        """A tokenizer that knows a placeholder too, for textual inversion (Gal et al. 2022).

        It gets `count` new ids after all others; in a prompt it becomes all of them. Their names are the token,
        "token_1", "token_2" ..., those of diffusers. Like all added tokens it is found within words and in any case.

        Raises:
          ValueError: a token that is known already, empty or with white space, or a count below one.
        """
        if count < 1 or token.split() != [token]:
            raise ValueError(
                f"the placeholder {token!r} with {count} ids cannot be added; give one word and at least one id"
            )
        names = [token, *(f"{token}_{i}" for i in range(1, count))]
        known = [name for name in names if self.backend.token_to_id(name) is not None]
        if known:
            raise ValueError(f"the tokenizer knows {known} already; choose another placeholder")
        ids = {name: self.backend.get_vocab_size() + i for i, name in enumerate(names)}
        return _made(tokens.with_added(self.files, ids), self.length)

    def save(self, folder: str | Path) -> None:
        """The files that it was loaded from, byte for byte but for placeholders; transformers reads them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (folder / name).write_bytes(content)

    def _pieces(self, parts: Sequence[tuple[str, float]]) -> list[Piece]:
        texts = [text for text, _ in parts]
        found = self.backend.encode_batch(texts, add_special_tokens=False)
        return [
            Piece(one, weight, part, start)
            for part, (encoding, (_, weight)) in enumerate(zip(found, parts, strict=True))
            for number, (start, _) in zip(encoding.ids, encoding.offsets, strict=True)
            for one in self.vectors.get(number, (number,))
        ]

    def _spans(self, text: str) -> list[tuple[int, int]]:
        """Where in the text each of its tokens stands."""
        encoding = self.backend.encode(text, add_special_tokens=False)
        return [
            span
            for number, span in zip(encoding.ids, encoding.offsets, strict=True)
            for _ in self.vectors.get(number, (number,))
        ]

    def _rows(
        self, prompts: Sequence[Sequence[tuple[str, float]]], chunks: int | None
    ) -> tuple[np.ndarray, np.ndarray]:
        if chunks is not None and chunks < 1:
            raise ValueError(f"chunks={chunks}; give at least one, or None for as many as needed")
        room = self.length - 2
        found = [self._pieces(parts) for parts in prompts]
        if chunks is None:
            chunks = max([1, *(-(-len(pieces) // room) for pieces in found)])
        ids = np.full((len(found), chunks, self.length), self.pad, np.int32)
        weights = np.ones(ids.shape, np.float32)
        ids[..., 0] = self.begin
        for row, pieces in enumerate(found):
            for chunk in range(chunks):
                inside = pieces[chunk * room : (chunk + 1) * room]
                n = len(inside)
                ids[row, chunk, 1 : n + 1] = [piece.id for piece in inside]
                weights[row, chunk, 1 : n + 1] = [piece.weight for piece in inside]
                ids[row, chunk, n + 1] = self.end
        shape = (len(found), chunks * self.length)
        return ids.reshape(shape), weights.reshape(shape)


def rows(tokenizer: Tokenizer, captions: Sequence[str]) -> Int[np.ndarray, "b n"]:
    """`tokenizer(captions)` for training: captions that are too long are cut, and that is logged."""
    ids = tokenizer(captions)
    full = [text for text, row in zip(captions, ids, strict=True) if row[-1] == tokenizer.end]
    cut = [text for text in full if tokenizer.cut(text)]
    if cut:
        logging.log_first_n(
            logging.WARNING,
            "%d of %d captions were cut to %d tokens, such as %.80r (said 5 times)",
            5,
            *(len(cut), len(captions), tokenizer.length, cut[0]),
        )
    return ids


def load(folder: str | Path, length: int = 77) -> Tokenizer:
    """The tokenizer of a folder with a `vocab.json` and `merges.txt`, a `vocab.txt`, or a `tokenizer.json`.

    Added tokens that are named "token", "token_1" ... are one placeholder with several ids (`Tokenizer.add`).

    Raises:
      FileNotFoundError: neither is there.
      ValueError: files that are not those of CLIP's or BERT's tokenizer.
    """
    folder = Path(folder)
    every = dict.fromkeys((*byte_pairs.FILES, *word_pieces.FILES))
    names = [name for name in every if (folder / name).is_file()]
    sets = ({tokens.WHOLE}, {byte_pairs.VOCAB, byte_pairs.MERGES}, {word_pieces.VOCAB})
    if not any(one <= {*names} for one in sets):
        raise FileNotFoundError(
            f"{folder} has no tokenizer.json, nor vocab.json with merges.txt, nor vocab.txt; give the folder of a CLIP "
            "or BERT tokenizer"
        )
    files = {name: (folder / name).read_bytes() for name in names}
    if length < 3:
        raise ValueError(f"length={length} has no room between begin and end; give at least 3")
    try:
        return _made(files, length)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder} holds no CLIP or BERT tokenizer ({type(error).__name__}: {error}); download its files anew"
        ) from error


_MARK = re.compile(
    r"\\(?P<literal>[\\()\[\]]?)"
    r"|(?P<open>[(\[])"
    r"|:\s*(?P<number>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)"
    r"|(?P<close>[)\]])"
    r"|[^\\()\[\]:]+|:"
)


def parse(text: str) -> list[tuple[str, float]]:
    """Text with brackets as parts with weights, in order; neighbours of one weight are one part."""
    parts: list[tuple[str, float]] = []
    opened: dict[str, list[int]] = {
        "(": [],
        "[": [],
    }  # how many parts came before each open bracket
    usual = {"(": 1.1, "[": 1 / 1.1}

    def weigh(since, factor):
        parts[since:] = [(part, weight * factor) for part, weight in parts[since:]]

    for match in _MARK.finditer(text):
        found = match.groupdict()
        closes = {")": "(", "]": "["}.get(found["close"])
        if found["open"]:
            opened[found["open"]].append(len(parts))
        elif found["number"] and opened["("]:
            weigh(opened["("].pop(), float(found["number"]))
        elif closes and opened[closes]:
            weigh(opened[closes].pop(), usual[closes])
        else:
            parts.append((match[0] if found["literal"] is None else found["literal"], 1.0))
    for bracket, befores in opened.items():
        for since in befores:
            weigh(since, usual[bracket])
    joined: list[tuple[str, float]] = []
    for part, weight in parts:
        if joined and joined[-1][1] == weight:
            part = joined.pop()[0] + part
        joined.append((part, weight))
    return joined or [("", 1.0)]


def _spoken(text: str, span: tuple[int, int]) -> bool:
    return any(letter.isalnum() for letter in text[slice(*span)])


def _several(texts: Sequence[str]) -> Sequence[str]:
    if isinstance(texts, str):
        raise ValueError(f"a sequence of texts was expected and {texts!r} is one; put it in a list")
    return texts


def _made(files: Mapping[str, bytes], length: int) -> Tokenizer:
    kind = word_pieces if word_pieces.fits(files) else byte_pairs
    return Tokenizer(*kind.read(files), dict(files), length)
