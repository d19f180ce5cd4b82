"""Folders of BERT's tokenizer with a small vocabulary, laid out as the published ones are."""

import json
import string

SPECIAL = ("[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = "the a of in painting cat cats horse house red blue cafe zurich ##ing ##s ##ed paint play 日 本 é 2 ##5"
# Some programs end a line here; in the published vocabulary such signs stand alone on theirs.
ODD = ("\x85", "\u2028", "\x1c")


def pieces():
    letters = [*string.ascii_lowercase, *string.digits, *",.!?'[]()#&", *"äñøßπж"]
    every = (*SPECIAL, *ODD, *letters, *(f"##{x}" for x in letters), *WORDS.split())
    return list(dict.fromkeys(every))


def write(folder, **config):
    """`vocab.txt` and a config, as beside CompVis' text-to-image model."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{piece}\n" for piece in pieces())
    (folder / "vocab.txt").write_text(text, encoding="utf-8", newline="")
    names = dict(
        unk_token="[UNK]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        mask_token="[MASK]",
    )
    plain = dict(
        do_lower_case=True,
        tokenize_chinese_chars=True,
        strip_accents=None,
        model_max_length=512,
        tokenizer_class="BertTokenizer",
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(plain | names | config))
    (folder / "special_tokens_map.json").write_text(json.dumps(names))
    return folder
