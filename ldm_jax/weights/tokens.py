"""What the files of a tokenizer say beside its vocabulary: which tokens have a meaning, and which were added to it."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import tokenizers

CONFIG, NAMES, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
WHOLE = "tokenizer.json"
FILES = (WHOLE, CONFIG, NAMES, ADDED)


class Encoder(NamedTuple):
    """What the files say: the encoder, and the ids that matter beside it."""

    backend: tokenizers.Tokenizer
    begin: int
    end: int
    pad: int
    vectors: dict[int, tuple[int, ...]]  # placeholders that stand for several ids, and these


def read_json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """What is in the JSON file; nothing where there is none."""
    return json.loads(files[name].decode()) if name in files else {}


def _token(given: str | Mapping[str, Any], special: bool) -> tokenizers.AddedToken:
    if isinstance(given, str):
        return tokenizers.AddedToken(given, special=special, normalized=not special)
    flags = {key: given[key] for key in ("lstrip", "rstrip", "single_word") if key in given}
    normalized = given.get("normalized", not special)
    return tokenizers.AddedToken(given["content"], **flags, normalized=normalized, special=special)


class Tokens(NamedTuple):
    named: dict[str, tokenizers.AddedToken | None]  # by their names in a config
    added: dict[int, tokenizers.AddedToken]  # by their ids


def read(files: Mapping[str, bytes], usual: Mapping[str, str | None]) -> Tokens:
    """The named tokens (begin, end, padding ...) and those with ids; as transformers reads them.

    `usual` are the named ones of this kind of tokenizer, in the order in which transformers adds them. What a
    config has under `added_tokens_decoder` says all about them; the other files count where it has none.
    """
    config = read_json(files, CONFIG)
    if "added_tokens_decoder" in config:
        given = {int(i): token for i, token in config["added_tokens_decoder"].items()}
    else:
        config = config | read_json(files, NAMES)
        given = {i: {"content": t} for t, i in read_json(files, ADDED).items()}
        given |= {token["id"]: token for token in read_json(files, WHOLE).get("added_tokens", ())}
    added = {i: _token(token, token.get("special", False)) for i, token in given.items()}
    known = {token["content"]: token for token in given.values()}
    named = {}
    for key, default in usual.items():
        token = config.get(key, default)
        token = known.get(token, token) if isinstance(token, str) else token
        named[key] = None if token is None else _token(token, special=True)
    for key in ("additional_special_tokens", "extra_special_tokens"):
        for token in config.get(key) or ():
            named[str(token)] = _token(known.get(str(token), token), special=True)
    return Tokens(named, added)


def add(
    backend: tokenizers.Tokenizer,
    named: Mapping[str, tokenizers.AddedToken | None],
    added: Mapping[int, tokenizers.AddedToken],
    begin: str,
    end: str,
) -> Encoder:
    """The encoder that knows these tokens too; `begin` and `end` are names of those that rows have there.

    Raises:
      ValueError: ids that are not the next ones after the vocabulary.
    """
    size = backend.get_vocab_size()
    backend.add_tokens([added[number] for number in sorted(added)])
    backend.add_special_tokens([token for token in named.values() if token is not None])
    wrong = {t.content: i for i, t in added.items() if backend.token_to_id(t.content) != i}
    if wrong:
        raise ValueError(f"the ids of the added tokens {wrong} do not follow on the vocabulary")
    return Encoder(
        backend,
        *(backend.token_to_id(named[key].content) for key in (begin, end, "pad_token")),
        vectors=_vectors({t.content: i for i, t in added.items() if i >= size}),
    )


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
    config, whole = read_json(files, CONFIG), read_json(files, WHOLE)
    changed = {}
    if "added_tokens_decoder" in config:
        more = {str(number): {"content": token, **plain} for token, number in ids.items()}
        config["added_tokens_decoder"] = config["added_tokens_decoder"] | more
        changed[CONFIG] = config
    elif not whole:
        changed[ADDED] = read_json(files, ADDED) | ids
    if whole:
        more = [{"id": number, "content": token, **plain} for token, number in ids.items()]
        whole["added_tokens"] = [*whole.get("added_tokens", ()), *more]
        changed[WHOLE] = whole
    written = {
        name: (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
        for name, content in changed.items()
    }
    return dict(files) | written
