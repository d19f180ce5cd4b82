"""Folders of CLIP tokenizers with a small vocabulary, laid out as the published ones are."""

import json

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, trainers

TEXT = """A photograph of an astronaut riding a horse, don't you think? The house of the three cats by the sea; a
painting in the style of an old master, highly detailed, 4k, trending. It's a caf\u00e9 in Z\u00fcrich: we'll see the
small houses, they're painted red and blue, I've seen 25 of them!! \u732b\u306e\u7d75 \U0001f600
the end of the painting"""
BEGIN, END = "<|startoftext|>", "<|endoftext|>"


def alphabet():
    """The 256 signs for bytes, in CLIP's order: those that are shown first."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in shown] + [chr(256 + i) for i in range(256 - len(shown))]


def merges(count=120):
    """Merges learnt from the text above."""
    learner = tokenizers.Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=count + 300, end_of_word_suffix="</w>", show_progress=False
    )
    learner.train_from_iterator([TEXT], trainer)
    return [tuple(m) for m in json.loads(learner.to_str())["model"]["merges"]][:count]


def flagged(token, **more):
    flags = dict(content=token, lstrip=False, normalized=True, rstrip=False, single_word=False)
    return flags | more


def write(folder, pad=END, style="old"):
    """Files as beside Stable Diffusion 1 and 2 ("old"), XL ("decoder"), or without any config ("bare")."""
    folder.mkdir(parents=True, exist_ok=True)
    learnt = merges()
    letters = alphabet()
    pieces = [*letters, *(f"{x}</w>" for x in letters), *("".join(m) for m in learnt), BEGIN, END]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    assert len(vocab) == len(pieces)
    lines = ["#version: 0.2", *(" ".join(m) for m in learnt)]
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = dict(
        add_prefix_space=False,
        do_lower_case=True,
        errors="replace",
        model_max_length=77,
        tokenizer_class="CLIPTokenizer",
    )
    names = dict(bos_token=BEGIN, eos_token=END, unk_token=END, pad_token=pad)
    if style == "old":
        for key in ("bos_token", "eos_token", "unk_token"):
            config[key] = flagged(names[key], __type="AddedToken")
            names[key] = flagged(names[key])
        config["pad_token"] = END  # of Stable Diffusion 2 as well; the other file says "!"
    elif style == "decoder":
        given = {
            vocab[BEGIN]: flagged(BEGIN, special=True),
            vocab[END]: flagged(END, normalized=False, special=True),
        }
        if pad != END:
            given[vocab[pad]] = flagged(pad, normalized=False, special=True)
        config |= names | dict(added_tokens_decoder={str(i): t for i, t in given.items()})
    if style != "bare":
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
        (folder / "special_tokens_map.json").write_text(json.dumps(names, indent=2))
    return folder
