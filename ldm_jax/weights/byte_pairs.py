"""The files of CLIP's tokenizer, and the byte-pair encoder that they describe.

Text is cut into words, and these into pieces of the vocabulary, bytes at the least (Radford et al. 2021), as the
`CLIPTokenizer` of transformers 5 and the `CLIPTokenizerFast` of 4 have the `tokenizers` library do it: NFC, white space
to single spaces, lower case; then words, single digits, and runs of other signs. The slow `CLIPTokenizer` of
transformers 4 differed on rare characters. With `ftfy` installed it mended text first (mojibake, curly quotes,
ligatures, control characters), as OpenAI's own code does, which also resolved HTML entities; without it, it left out
control characters, put spaces around Chinese ones, and NFC came after that. None of this is done here.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
NAMED = dict(  # in the order in which transformers adds them: of equal ones, the last says how it is matched
    bos_token=BEGIN,
    eos_token=END,
    unk_token=END,
    sep_token=None,
    pad_token=END,
    cls_token=None,
    mask_token=None,
)
CONFIG, NAMES, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
WHOLE, VOCAB, MERGES = "tokenizer.json", "vocab.json", "merges.txt"
FILES = (VOCAB, MERGES, WHOLE, CONFIG, NAMES, ADDED)
WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


def _json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    return json.loads(files[name].decode()) if name in files else {}


class Encoder(NamedTuple):
    """What the files say: the encoder, and the ids that matter beside it."""

    backend: tokenizers.Tokenizer
    begin: int
    end: int
    pad: int
    vectors: dict[int, tuple[int, ...]]  # placeholders that stand for several ids, and these


def read(files: Mapping[str, bytes]) -> Encoder:
    """The encoder of some of `FILES`.

    Raises:
      ValueError: another kind of tokenizer, or files that contradict each other.
    """
    whole, config = _json(files, WHOLE), _json(files, CONFIG)
    kind = config.get("tokenizer_class")
    if kind not in (None, "CLIPTokenizer", "CLIPTokenizerFast"):
        raise ValueError(f"a CLIPTokenizer was expected and the files are those of a {kind}")
    if whole:
        vocab, merges = whole["model"]["vocab"], whole["model"]["merges"]
        merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in merges]
    else:
        vocab = _json(files, VOCAB)
        lines = files[MERGES].decode().split("\n")
        merges = [tuple(m.split()) for m in lines if m.strip() and not m.startswith("#version")]
    named, added = _tokens(files)
    text = {key: getattr(token, "content", None) for key, token in named.items()}
    absent = [t for t in (text["bos_token"], text["eos_token"]) if t not in vocab]
    if absent:
        raise ValueError(f"the vocabulary lacks {absent}; give the files of a CLIP tokenizer")
    try:
        model = models.BPE(vocab, merges, unk_token=text["unk_token"], end_of_word_suffix="</w>")
    except Exception as error:  # the library raises a plain Exception
        raise ValueError(f"the merges do not fit the vocabulary: {error}") from error
    backend = tokenizers.Tokenizer(model)
    spaces = normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    words = pre_tokenizers.Split(tokenizers.Regex(WORDS), behavior="removed", invert=True)
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, in_bytes])
    backend.add_tokens([added[number] for number in sorted(added)])
    backend.add_special_tokens([token for token in named.values() if token is not None])
    wrong = {t.content: i for i, t in added.items() if backend.token_to_id(t.content) != i}
    if wrong:
        raise ValueError(f"the ids of the added tokens {wrong} do not follow on the vocabulary")
    return Encoder(
        backend,
        begin=backend.token_to_id(text["bos_token"]),
        end=backend.token_to_id(text["eos_token"]),
        pad=backend.token_to_id(text["pad_token"]),
        vectors=_vectors({t.content: i for i, t in added.items() if i >= len(vocab)}),
    )


def _token(given: str | Mapping[str, Any], special: bool) -> tokenizers.AddedToken:
    if isinstance(given, str):
        return tokenizers.AddedToken(given, special=special, normalized=not special)
    flags = {key: given[key] for key in ("lstrip", "rstrip", "single_word") if key in given}
    normalized = given.get("normalized", not special)
    return tokenizers.AddedToken(given["content"], **flags, normalized=normalized, special=special)


def _tokens(files: Mapping[str, bytes]):
    """The named tokens (begin, end, padding ...) and those with ids; as transformers reads them.

    What a config has under `added_tokens_decoder` says all about them; the other files count where it has none.
    """
    config = _json(files, CONFIG)
    if "added_tokens_decoder" in config:
        given = {int(i): token for i, token in config["added_tokens_decoder"].items()}
    else:
        config = config | _json(files, NAMES)
        given = {i: {"content": t} for t, i in _json(files, ADDED).items()}
        given |= {token["id"]: token for token in _json(files, WHOLE).get("added_tokens", ())}
    added = {i: _token(token, token.get("special", False)) for i, token in given.items()}
    known = {token["content"]: token for token in given.values()}
    named = {}
    for key, default in NAMED.items():
        token = config.get(key, default)
        token = known.get(token, token) if isinstance(token, str) else token
        named[key] = None if token is None else _token(token, special=True)
    for key in ("additional_special_tokens", "extra_special_tokens"):
        for token in config.get(key) or ():
            named[str(token)] = _token(known.get(str(token), token), special=True)
    return named, added


def _vectors(added: Mapping[str, int]) -> dict[int, tuple[int, ...]]:
    """Ids of the tokens beside which there are "token_1", "token_2" ..., and all ids of each."""
    found = {}
    for token, number in added.items():
        ids = [number]
        while f"{token}_{len(ids)}" in added:
            ids.append(added[f"{token}_{len(ids)}"])
        if len(ids) > 1:
            found[number] = tuple(ids)
    return found


def with_added(files: Mapping[str, bytes], ids: Mapping[str, int]) -> dict[str, bytes]:
    """The files of a tokenizer with more tokens."""
    plain = dict(lstrip=False, normalized=True, rstrip=False, single_word=False, special=False)
    config, whole = _json(files, CONFIG), _json(files, WHOLE)
    changed = {}
    if "added_tokens_decoder" in config:
        more = {str(number): {"content": token, **plain} for token, number in ids.items()}
        config["added_tokens_decoder"] = config["added_tokens_decoder"] | more
        changed[CONFIG] = config
    elif not whole:
        changed[ADDED] = _json(files, ADDED) | ids
    if whole:
        more = [{"id": number, "content": token, **plain} for token, number in ids.items()]
        whole["added_tokens"] = [*whole.get("added_tokens", ()), *more]
        changed[WHOLE] = whole
    written = {
        name: (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
        for name, content in changed.items()
    }
    return dict(files) | written
