"""Textual inversion: new words, each one or several learnt rows of a text encoder's table (Gal et al. 2022).

A file holds a word's vectors, and the network is the one that it was learnt with. Putting a word in takes three steps:
its rows go to the end of the table (`add`), the encoder is told that its vocabulary is larger, and the tokenizer gives
the word the numbers of these rows (`Tokenizer.add` in `prompts`):

    word = inversion.read(files.read(path))
    for component, vectors in word.vectors.items():
        params["token"]["embedding"] = inversion.add(params["token"]["embedding"], vectors)
        encoder = encoder.clone(vocab=encoder.vocab + len(vectors), eos=49407)
        tokenizer = tokenizer.add(word.token, len(vectors))

An encoder that finds the end of the text as the largest number must be told the number of the end, as here, since the
new words have larger ones.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# Names in files for several text encoders, and those of the components.
COMPONENTS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5xxl": "text_encoder_3"}
NAMELESS = (
    "*",
    "emb_params",
)  # files of AUTOMATIC1111's interface; the word is the file's name there


class Inversion(NamedTuple):
    """A word, and its rows in the table of each text encoder that it is for."""

    token: str
    vectors: dict[str, Any]  # {"text_encoder": Float[np.ndarray, "n d"]}, in the type of the file


def read(tensors: Mapping[str, Any], token: str | None = None) -> Inversion:
    """The word in a file of diffusers ({word: vectors}), of SDXL (`clip_l`, `clip_g`) or of AUTOMATIC1111.

    The last are `.pt` files with the vectors in `string_to_param` (all of the file, or this part of it) or safetensors
    with `emb_params`. `token` names the word, where the file does not or where it shall have another name.

    Raises:
      ValueError: another kind of file, vectors that are no matrix, encoders with different numbers of them, or no name.
    """
    inner = tensors.get("string_to_param", tensors)
    if inner and inner.keys() <= COMPONENTS.keys():
        named, found = None, {COMPONENTS[name]: inner[name] for name in COMPONENTS if name in inner}
    elif isinstance(inner, Mapping) and len(inner) == 1:
        named, found = next(iter(inner)), {"text_encoder": next(iter(inner.values()))}
    else:
        raise ValueError(
            f"this is no file of textual inversion: it holds {sorted(map(str, inner))[:5]}, where the vectors of one "
            "word, or of clip_l and clip_g, were expected"
        )
    vectors = {component: np.asarray(tensor) for component, tensor in found.items()}
    vectors = {c: x[None] if x.ndim == 1 else x for c, x in vectors.items()}
    shapes = {component: x.shape for component, x in vectors.items()}
    if (
        any(len(shape) != 2 for shape in shapes.values())
        or len({s[0] for s in shapes.values()}) != 1
    ):
        raise ValueError(
            f"the vectors of this textual inversion have shapes {shapes}; [n, width] was expected, with one n"
        )
    token = token or (None if named in NAMELESS else named)
    if not token:
        raise ValueError("the file does not say which word it is for; name it with `token`")
    return Inversion(token, vectors)


def add(table: Float[Array, "v d"], vectors: Any) -> Float[Array, "w d"]:
    """A text encoder's table of tokens with these rows [n, d] at its end, in its own type: w = v + n.

    Raises:
      ValueError: vectors of another width, which were learnt with another text encoder.
    """
    if np.ndim(vectors) != 2 or vectors.shape[1] != table.shape[1]:
        raise ValueError(
            f"the vectors have shape {np.shape(vectors)} and the text encoder's tokens a width of {table.shape[1]}; "
            "they were learnt with another text encoder: use them with the model that they were made for"
        )
    return jnp.concatenate([table, jnp.asarray(vectors).astype(table.dtype)])
