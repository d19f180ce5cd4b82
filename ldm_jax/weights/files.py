"""Safetensors files: one, or several with an index beside them, read when asked for and never as a whole."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors
from safetensors.numpy import save_file


class Stored:
    """A tensor in a file: its shape is known, `np.asarray` reads it."""

    def __init__(self, file: safetensors.safe_open, name: str):
        self._file, self._name = file, name
        self.shape = tuple(file.get_slice(name).get_shape())

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self._file.get_tensor(self._name), dtype)


def read(path: str | Path) -> dict[str, Stored]:
    """The tensors of a `.safetensors` file, or of all files that a `.safetensors.index.json` names.

    Raises:
      FileNotFoundError: there is no such file, or one that the index names is missing.
      ValueError: a file that is truncated or no safetensors file, or that lacks a tensor of the index.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; give a .safetensors file or its index")
    if path.suffix != ".json":
        file = _open(path)
        return {name: Stored(file, name) for name in file.keys()}  # noqa: SIM118 (no dict)
    try:
        places = dict(json.loads(path.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no index of safetensors files ({type(error).__name__}: {error}); download it anew"
        ) from error
    parts = {name: read(path.parent / name) for name in sorted(set(places.values()))}
    absent = [f"{name!r} in {part}" for name, part in places.items() if name not in parts[part]]
    if absent:
        raise ValueError(
            f"{path} names tensors that the files lack: {', '.join(absent[:5])}; download them anew"
        )
    return {name: parts[part][name] for name, part in places.items()}


def _open(path: Path) -> safetensors.safe_open:
    try:
        return safetensors.safe_open(path, framework="numpy")
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} cannot be read as safetensors ({error}): it is truncated or of another format; download it anew"
        ) from error


def write(path: str | Path, tensors: Mapping[str, np.ndarray]) -> None:
    """One file; it appears when it is whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    # It writes the memory of an array as it lies there, whatever the order of the axes.
    rows = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    # transformers and diffusers ask for this format.
    save_file(rows, part, metadata={"format": "pt"})
    part.replace(path)


def metadata(path: str | Path) -> dict[str, str]:
    """What the header of a `.safetensors` file says besides the tensors; empty where it says nothing.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a file that is truncated or no safetensors file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}; give a .safetensors file")
    return dict(_open(Path(path)).metadata() or {})
