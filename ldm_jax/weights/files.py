"""Safetensors files: one, or several with an index beside them, read when asked for and never as a whole."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
from safetensors.numpy import save_file

# What numpy calls the types of the format; those that it lacks (a block of scaled numbers) cannot be read.
TYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "BOOL": np.bool_,
} | {f"{sign}{bits}": f"{sign.lower()}{bits // 8}" for sign in "IU" for bits in (8, 16, 32, 64)}


class Stored:
    """A tensor in a file: its shape and type are known, `np.asarray` reads it.

    It is read, not mapped: mapped pages would count as memory of the process for as long as the file is open.
    """

    def __init__(self, path: Path, name: str, offset: int, shape: tuple[int, ...], kind: str):
        self._path, self._name, self._offset = path, name, offset
        self.shape = shape
        self.dtype = np.dtype(TYPES[kind]) if kind in TYPES else None

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        if self.dtype is None:
            raise ValueError(f"{self._name!r} in {self._path} has a type that numpy lacks")
        count = math.prod(self.shape)
        read = np.fromfile(self._path, self.dtype, count, offset=self._offset)
        if read.size != count:
            raise ValueError(f"{self._path} became shorter while it was read; download it anew")
        return np.asarray(read.reshape(self.shape), dtype)


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
        return _stored(path)
    try:
        places = dict(json.loads(path.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no index of safetensors files ({type(error).__name__}: {error}); download it anew"
        ) from error
    outside = [name for name in places.values() if not _is_name(name)]
    if outside:
        raise ValueError(
            f"{path} names {outside[0]!r}, which is no .safetensors file beside it; "
            "download it anew from a source that you trust"
        )
    parts = {name: read(path.parent / name) for name in sorted(set(places.values()))}
    absent = [f"{name!r} in {part}" for name, part in places.items() if name not in parts[part]]
    if absent:
        raise ValueError(
            f"{path} names tensors that the files lack: {', '.join(absent[:5])}; download them anew"
        )
    return {name: parts[part][name] for name, part in places.items()}


def _is_name(name: Any) -> bool:
    """Whether it is the bare name of a safetensors file: no other folder can be reached by it."""
    return isinstance(name, str) and re.fullmatch(r"[^/\\\0]+\.safetensors", name) is not None


def _stored(path: Path) -> dict[str, Stored]:
    """The table of contents: a length of 8 bytes, so much JSON, the data."""
    _open(path)  # which checks that all of it fits together
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
    entries.pop("__metadata__", None)
    return {
        name: Stored(
            path, name, 8 + length + entry["data_offsets"][0], tuple(entry["shape"]), entry["dtype"]
        )
        for name, entry in entries.items()
    }


def _open(path: Path) -> safetensors.safe_open:
    try:
        return safetensors.safe_open(path, framework="numpy")
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} cannot be read as safetensors ({error}): it is truncated or of another format; download it anew"
        ) from error


def write(
    path: str | Path, tensors: Mapping[str, np.ndarray], about: Mapping[str, str] | None = None
) -> None:
    """One file, with what its header says `about` it; it appears when it is whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    # It writes the memory of an array as it lies there, whatever the order of the axes.
    rows = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    # transformers and diffusers ask for this format.
    save_file(rows, part, metadata={"format": "pt"} | dict(about or {}))
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
