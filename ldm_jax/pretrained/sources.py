"""Where a pretrained model comes from: a folder of diffusers here, or a single file (`single_files`).

Both are opened to the same `Source`: what components there are, with their configs, and how to get at the tensors of
each. Nothing but configs and the tables of contents of files is read.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from absl import logging

from ldm_jax.pretrained import controlnets, kinds
from ldm_jax.pretrained.components import Component, Tensors
from ldm_jax.weights import folder, prompts

TEXTS = ("text_encoder", "text_encoder_2")
NETWORKS = ("unet", "vae", *TEXTS)
TOKENIZERS = ("tokenizer", "tokenizer_2")
SCHEDULERS = ("scheduler", "low_res_scheduler", "image_noising_scheduler")
PROCESSORS = ("feature_extractor",)
# What a folder may have and sampling does not need; the text says what that means for the user.
UNUSED = {
    "safety_checker": "images are not checked",
    "depth_estimator": "give the depth to `depth_to_image`",
    "image_encoder": None,
}


class Source(NamedTuple):
    index: dict[str, Any]  # as in model_index.json
    networks: dict[str, tuple[str, dict[str, Any]]]  # class and config of each
    tokenizers: dict[str, prompts.Tokenizer]
    schedulers: dict[str, dict[str, Any]]
    tensors: Callable[[str, Component], Tensors]
    processors: Mapping[str, Mapping[str, Any]] = {}  # how images are prepared, by component
    steering: tuple[controlnets.Stored, ...] = ()  # ControlNets


def open_folder(path: Path, variant: str | None) -> Source:
    """A folder that diffusers wrote.

    Raises:
      FileNotFoundError, ValueError: something is missing, unreadable, or not known here.
    """
    opened = folder.open_folder(path)
    parts, needed = opened.parts, kinds.needed(opened.index)
    known = {*NETWORKS, *SCHEDULERS, *TOKENIZERS, *PROCESSORS, *UNUSED, *needed, controlnets.NAME}
    unknown = sorted(parts.keys() - known)
    missing = [name for name in needed if name not in parts]
    if unknown or missing:
        told = [f"its component {name!r} is missing" for name in missing]
        told += [f"a component {name!r} is not known here" for name in unknown]
        raise ValueError(f"{path} is a {opened.index.get('_class_name')}: {'; '.join(told)}")
    for name in sorted(parts.keys() & UNUSED.keys() - {*needed}):
        if UNUSED[name]:
            logging.warning("%s: its %s is not used; %s", path, name, UNUSED[name])
    parts = kinds.renamed(parts)
    networks = [*NETWORKS, *(name for name in kinds.VISION if name in needed)]

    steering = parts.get(controlnets.NAME)
    several = steering is not None and steering.kind == controlnets.SEVERAL
    at = controlnets.folders(path) if several else [steering.folder] if steering else []

    def tensors(name, component):
        return component.stored(folder.weights(parts[name].folder, component.stem, variant))

    return Source(
        opened.index,
        {name: (parts[name].kind, parts[name].config) for name in networks if name in parts},
        {name: prompts.load(parts[name].folder) for name in TOKENIZERS if name in parts},
        {name: parts[name].config for name in SCHEDULERS if name in parts},
        tensors,
        {name: parts[name].config for name in PROCESSORS if name in parts},
        tuple(controlnets.of_folder(net, variant) for net in at),
    )


def local(path: str | Path, revision: str | None) -> Path:
    """The file or folder; fetched first, if `path` names a repository.

    Raises:
      FileNotFoundError: none of these.
      ValueError: a repository without a revision, or without the library that fetches it.
    """
    if Path(path).exists():
        return Path(path)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(path)):
        raise FileNotFoundError(f"there is no file or folder {path}")
    if revision is None:
        raise ValueError(
            f"there is no folder {path}; to fetch the repository of this name give a `revision` (a commit), "
            "so that the same weights come tomorrow"
        )
    try:
        import huggingface_hub
    except ImportError as error:
        raise ValueError(
            f"there is no folder {path}, and to fetch a repository huggingface_hub must be installed: "
            "pip install huggingface_hub"
        ) from error
    patterns = ["*.json", "*.txt", "*.safetensors"]
    fetched = huggingface_hub.snapshot_download(
        str(path), revision=revision, allow_patterns=patterns
    )
    return Path(fetched)
