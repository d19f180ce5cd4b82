"""A folder of diffusers: `model_index.json`, and a folder with a `config.json` and safetensors for each component."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ldm_jax.weights import files


class Part(NamedTuple):
    """A component as the index names it: ["diffusers", "UNet2DConditionModel"]."""

    library: str
    kind: str  # its class
    folder: Path
    config: dict[str, Any]


class Folder(NamedTuple):
    index: dict[str, Any]
    parts: dict[str, Part]


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Raises: FileNotFoundError, ValueError: no such file, or no JSON object."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path.name} in {path.parent}, which {what} has")
    try:
        read = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); download it anew") from error
    if not isinstance(read, dict):
        raise ValueError(f"{path} holds no JSON object; download it anew")
    return read


def open_folder(path: str | Path) -> Folder:
    """What the folder holds; no tensor is read, and components that the index leaves out ([null, null]) are not there.

    Raises:
      FileNotFoundError: no folder, or one without an index or a component's config.
      ValueError: a file that is no JSON object, or a component whose name is no folder's name.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"there is no folder {path}")
    index = read_json(path / "model_index.json", "a folder of diffusers")
    parts = {}
    for name, value in index.items():
        if name.startswith("_") or not isinstance(value, list) or len(value) != 2 or not value[1]:
            continue
        if not re.fullmatch(r"\w+", name):
            raise ValueError(f"the index of {path} names a component {name!r}; that is no folder")
        library, kind = value
        folder = path / name
        parts[name] = Part(library, kind, folder, _config(folder, kind))
    return Folder(index, parts)


# What the config of a class is named, by a part of the class's name; of others it is "config".
CONFIGS = {
    "Scheduler": "scheduler_config",
    "Tokenizer": "tokenizer_config",
    "FeatureExtractor": "preprocessor_config",
    "ImageProcessor": "preprocessor_config",
}


def _config(folder: Path, kind: str) -> dict[str, Any]:
    file = next((file for part, file in CONFIGS.items() if part in kind), "config")
    return read_json(folder / f"{file}.json", f"a {kind}")


def weights(folder: Path, stem: str, variant: str | None = None) -> Mapping[str, files.Stored]:
    """The tensors of a component: `stem` is "model" (transformers) or "diffusion_pytorch_model" (diffusers).

    With `variant="fp16"`, those of the files that carry this name.

    Raises:
      FileNotFoundError: no such file; it names those that are there.
    """
    ending = f".{variant}" if variant else ""
    names = (
        f"{stem}{ending}.safetensors",
        f"{stem}.safetensors.index{ending}.json",
        f"{stem}{ending}.safetensors.index.json",
    )
    for name in names:
        if (folder / name).is_file():
            return files.read(folder / name)
    there = sorted(p.name for p in folder.glob("*") if p.suffix != ".md") if folder.is_dir() else []
    raise FileNotFoundError(
        f"{folder} holds no {names[0]} nor its index; it holds {there}; give another `variant`, or "
        "save the model as safetensors"
    )
