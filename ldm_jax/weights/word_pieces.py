"""The files of BERT's tokenizer, and the encoder of word pieces that they describe.

Text is cleaned of control characters, put into lower case without accents, and cut at white space, at punctuation and
around Chinese characters; words become the longest pieces of the vocabulary from left to right, of which all but the
first begin with "##" (Devlin et al. 2019). A word with a letter that no piece has is the unknown token as a whole. The
`BertTokenizer` of transformers has the `tokenizers` library do the same.
"""

import io
from collections.abc import Mapping

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from ldm_jax.weights import tokens
from ldm_jax.weights.tokens import CONFIG, WHOLE, Encoder

VOCAB = "vocab.txt"
FILES = (VOCAB, *tokens.FILES)
CLASSES = ("BertTokenizer", "BertTokenizerFast")
NAMED = dict(  # in the order in which transformers adds them
    bos_token=None,
    eos_token=None,
    unk_token="[UNK]",
    sep_token="[SEP]",
    pad_token="[PAD]",
    cls_token="[CLS]",
    mask_token="[MASK]",
)
NEEDED = ("cls_token", "sep_token", "pad_token", "unk_token")


def fits(files: Mapping[str, bytes]) -> bool:
    """Whether these are files of BERT's tokenizer, as far as can be told without reading all of them."""
    kind = tokens.read_json(files, CONFIG).get("tokenizer_class")
    if kind is not None:
        return kind in CLASSES
    if WHOLE in files:
        return tokens.read_json(files, WHOLE)["model"].get("type") == "WordPiece"
    return VOCAB in files


def read(files: Mapping[str, bytes]) -> Encoder:
    """The encoder of some of `FILES`.

    Raises:
      ValueError: files that contradict each other, or a vocabulary without the tokens that rows need.
    """
    whole, config = tokens.read_json(files, WHOLE), tokens.read_json(files, CONFIG)
    if whole:
        vocab = whole["model"]["vocab"]
    else:
        # Only ends of lines end a piece here: `splitlines` knows more of them, and some are pieces.
        lines = io.TextIOWrapper(io.BytesIO(files[VOCAB]), encoding="utf-8")
        vocab = {line.rstrip("\n"): i for i, line in enumerate(lines)}
    named, added = tokens.read(files, NAMED)
    absent = [key for key in NEEDED if getattr(named[key], "content", None) not in vocab]
    if absent:
        raise ValueError(f"the vocabulary lacks the {absent}; give the files of a BERT tokenizer")
    model = models.WordPiece(vocab, unk_token=named["unk_token"].content)
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        strip_accents=config.get("strip_accents"),  # None: as the case is
        lowercase=config.get("do_lower_case", True),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokens.add(backend, named, added, "cls_token", "sep_token")
