"""The files of CLIP's tokenizer, and the byte-pair encoder that they describe.

Text is cut into words, and these into pieces of the vocabulary, bytes at the least (Radford et al. 2021), as the
`CLIPTokenizer` of transformers 5 and the `CLIPTokenizerFast` of 4 have the `tokenizers` library do it: NFC, white space
to single spaces, lower case; then words, single digits, and runs of other signs. The slow `CLIPTokenizer` of
transformers 4 differed on rare characters. With `ftfy` installed it mended text first (mojibake, curly quotes,
ligatures, control characters), as OpenAI's own code does, which also resolved HTML entities; without it, it left out
control characters, put spaces around Chinese ones, and NFC came after that. None of this is done here.
"""

from collections.abc import Mapping

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from ldm_jax.weights import tokens
from ldm_jax.weights.tokens import CONFIG, WHOLE, Encoder

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
VOCAB, MERGES = "vocab.json", "merges.txt"
FILES = (VOCAB, MERGES, *tokens.FILES)
WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


def read(files: Mapping[str, bytes]) -> Encoder:
    """The encoder of some of `FILES`.

    Raises:
      ValueError: another kind of tokenizer, or files that contradict each other.
    """
    whole, config = tokens.read_json(files, WHOLE), tokens.read_json(files, CONFIG)
    kind = config.get("tokenizer_class")
    if kind not in (None, "CLIPTokenizer", "CLIPTokenizerFast"):
        raise ValueError(f"a CLIPTokenizer was expected and the files are those of a {kind}")
    if whole:
        vocab, merges = whole["model"]["vocab"], whole["model"]["merges"]
        merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in merges]
    else:
        vocab = tokens.read_json(files, VOCAB)
        lines = files[MERGES].decode().split("\n")
        merges = [tuple(m.split()) for m in lines if m.strip() and not m.startswith("#version")]
    named, added = tokens.read(files, NAMED)
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
    return tokens.add(backend, named, added, "bos_token", "eos_token")
