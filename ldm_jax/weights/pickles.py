"""What `torch.save` has written: `.ckpt`, `.pth`, `.pt` and `.bin` files, read without torch and without running them.

A pickle is a program for a machine whose instructions can call what they can name. Here a name gets nothing but what
this file makes: `find_class` imports no module, so that nothing else can be reached, let alone called. The few names of
which tensors are made become descriptions of tensors. Every other name becomes an inert stand-in, which takes whatever
it is given and does nothing: checkpoints of PyTorch-Lightning have their callbacks and settings beside the weights
(that of Stable Diffusion 1.4 names `ModelCheckpoint`). A stand-in among the weights is an error that tells its name.

Two containers: since torch 1.6 a zip archive with the pickle `NAME/data.pkl` and the storages `NAME/data/KEY`
(`torch/serialization.py`, `_save`); before it one file of several pickles, after which the storages follow in the order
of a list of their keys, each after its length (`_legacy_save`).
"""

import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from io import BufferedIOBase
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

# What each kind of storage holds; a new kind of number is named by its type instead ("torch.float8_e4m3fn").
TYPES = {
    "float64": (np.float64, "DoubleStorage"),
    "float32": (np.float32, "FloatStorage"),
    "float16": (np.float16, "HalfStorage"),
    "bfloat16": (ml_dtypes.bfloat16, "BFloat16Storage"),
    "int64": (np.int64, "LongStorage"),
    "int32": (np.int32, "IntStorage"),
    "int16": (np.int16, "ShortStorage"),
    "int8": (np.int8, "CharStorage"),
    "uint8": (np.uint8, "ByteStorage"),
    "bool": (np.bool_, "BoolStorage"),
    "uint16": (np.uint16, None),
    "uint32": (np.uint32, None),
    "uint64": (np.uint64, None),
    "float8_e4m3fn": (ml_dtypes.float8_e4m3fn, None),
    "float8_e5m2": (ml_dtypes.float8_e5m2, None),
}
DTYPES = {
    f"torch.{name}": np.dtype(dtype)
    for number, (dtype, storage) in TYPES.items()
    for name in (number, storage)
    if name
} | {"torch.storage.UntypedStorage": np.dtype(np.uint8)}
MAGIC = 0x1950A86A20F9469CFC6C  # of the older container
VERSION = 1001
# What a pickle that was tampered with, or cut off, may end in.
BROKEN = (
    *(pickle.UnpicklingError, zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError),
    *(AttributeError, TypeError, ValueError, LookupError, ArithmeticError),
    *(MemoryError, RuntimeError, ImportError),
)


class Storage(NamedTuple):
    """What a pickle says of a storage."""

    type: str  # a key of DTYPES
    key: str
    count: int  # of elements


class View(NamedTuple):
    """What a pickle says of a tensor: a part of a storage."""

    storage: Storage
    type: str
    offset: int  # in elements, as are the strides
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Inert:
    """Stands for what is not known; takes whatever it is given and does nothing."""

    name = "?"

    def __new__(cls, *args, **kwargs):
        return object.__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def _nothing(self, *args, **kwargs):
        return self

    __call__ = __setstate__ = __setitem__ = append = extend = add = _nothing


class Ordered(dict):
    """An OrderedDict; torch writes attributes of one, which are dropped."""

    def __setstate__(self, state):
        pass


class Restricted(pickle.Unpickler):
    """Makes plain data, Views and Inert ones. Whatever a pickle gets hold of lives no longer than its reading."""

    def find_class(self, module: str, name: str) -> Any:
        origin = f"{module}.{name}"
        if origin in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor"):
            return lambda storage, offset, shape, strides, *_: _view(
                storage, storage.type, offset, shape, strides
            )
        if origin == "torch._utils._rebuild_tensor_v3":
            return lambda storage, offset, shape, strides, grad, hooks, dtype, *_: _view(
                storage, dtype, offset, shape, strides
            )
        if origin == "torch._utils._rebuild_parameter":
            return lambda data, *_: data
        if origin == "torch.Size":
            return lambda sizes=(): tuple(sizes)
        if origin == "collections.OrderedDict":
            return type("Ordered", (Ordered,), {})
        if origin in DTYPES:
            return origin
        return type("Inert", (Inert,), {"name": origin})

    def persistent_load(self, pid: Any) -> Any:
        if pid[0] == "module":  # the older container has the source of a class beside its name
            return pid[1]
        kind, dtype, key, _, count, *view = pid
        if kind != "storage" or dtype not in DTYPES or any(v is not None for v in view):
            raise pickle.UnpicklingError(f"a storage of the unknown kind {_told(dtype)}")
        return Storage(dtype, str(key), _count(count))


def _count(n: Any) -> int:
    if type(n) is not int or n < 0:
        raise pickle.UnpicklingError(f"{_told(n)} is no number of elements")
    return n


def _view(storage: Any, dtype: Any, offset: Any, shape: Any, strides: Any) -> View:
    if type(storage) is not Storage or DTYPES.get(dtype) is None:
        raise pickle.UnpicklingError(f"a tensor of {_told(dtype)} in {_told(storage)}")
    shape, strides = (tuple(_count(n) for n in sizes) for sizes in (shape, strides))
    if len(shape) != len(strides):
        raise pickle.UnpicklingError(f"a tensor of shape {shape} has strides {strides}")
    end = _count(offset) + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1
    room = storage.count * DTYPES[storage.type].itemsize // DTYPES[dtype].itemsize
    if 0 not in shape and end > room:
        raise pickle.UnpicklingError(f"a tensor of {end} elements in a storage of {room}")
    return View(storage, dtype, offset, shape, strides)


def _told(value: Any) -> str:
    """A value in an error."""
    if isinstance(value, Inert):
        return value.name
    if isinstance(value, type) and issubclass(value, Inert):
        return value.name
    return f"{value!r:.80}" if isinstance(value, str | int | tuple) else type(value).__name__


class Stored:
    """A tensor in a file: its shape is known, `np.asarray` reads it."""

    def __init__(self, view: View, read: Callable[[Storage, int, int], bytes]):
        self._view, self._read = view, read
        self.shape, self.dtype = view.shape, DTYPES[view.type]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        """Of the storage that is read which lies between the first and the last element."""
        view, size = self._view, self.dtype.itemsize
        count = sum((n - 1) * s for n, s in zip(view.shape, view.strides, strict=True)) + 1
        if 0 in view.shape:
            return np.zeros(view.shape, dtype or self.dtype)
        content = self._read(view.storage, view.offset * size, count * size)
        strides = tuple(s * size for s in view.strides)
        array = np.ndarray(view.shape, self.dtype, content, strides=strides)
        return array.astype(dtype or self.dtype, order="C")


def read(path: str | Path) -> dict[str, Stored]:
    """The tensors of a file of torch, of its `state_dict` where it has one; they are read when asked for.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a file that is truncated or none of torch's, a pickle that wants something else than tensors where
        the weights are, or entries that are no tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; give a file that torch.save has written")
    with path.open("rb") as file:
        start = file.read(4)
    try:
        content, fetch = _zipped(path) if start == b"PK\x03\x04" else _legacy(path)
    except BROKEN as error:
        raise ValueError(
            f"{path} cannot be read as a file of torch ({type(error).__name__}: {error}): it is truncated, of another "
            "format, or its pickle wants more than tensors; download it anew, or take a .safetensors file"
        ) from error
    content = _unwrapped(content)
    if not isinstance(content, Mapping):
        raise ValueError(
            f"{path} holds {_told(content)} instead of a dict of tensors; save the state dict of the model alone"
        )
    wrong = [
        f"{_told(name)}: {_told(value)}"
        for name, value in content.items()
        if type(value) is not View or type(name) is not str
    ]
    if wrong:
        raise ValueError(
            f"{path} has {len(wrong)} entries that are no tensors where the weights are: {', '.join(wrong[:5])}; such "
            "things are not loaded: save the state dict of the model alone"
        )
    return {name: Stored(view, fetch) for name, view in content.items()}


def _unwrapped(content: Any) -> Any:
    """The innermost state dict; checkpoints of trainers are one or two deep, textual inversion has its own name."""
    for _ in range(3):
        for name in ("state_dict", "string_to_param"):
            if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
                content = content[name]
    return content


def _unpickled(file: BufferedIOBase) -> Any:
    return Restricted(file, encoding="utf-8").load()


def _zipped(path: Path) -> tuple[Any, Callable]:
    archive = zipfile.ZipFile(path)
    names = {n.partition("/")[2]: n for n in archive.namelist() if "/" in n}
    if "data.pkl" not in names:
        raise zipfile.BadZipFile("the archive has no data.pkl")
    if "byteorder" in names and archive.read(names["byteorder"]) != b"little":
        raise ValueError("its numbers are not little-endian")
    with archive.open(names["data.pkl"]) as file:
        content = _unpickled(file)

    def fetch(storage, start, count):
        name = f"data/{storage.key}"
        try:
            with archive.open(names[name]) as file:
                file.seek(start)
                return _exactly(file, count)
        except (KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{path} has no whole storage {name!r} ({error}); download it anew"
            ) from error

    return content, fetch


def _legacy(path: Path) -> tuple[Any, Callable]:
    used: dict[str, Storage] = {}

    class Noting(Restricted):
        def persistent_load(self, pid):
            found = super().persistent_load(pid)
            return used.setdefault(found.key, found) if type(found) is Storage else found

    with path.open("rb") as file:
        if _unpickled(file) != MAGIC:
            raise pickle.UnpicklingError("the magic number is another")
        if (version := _unpickled(file)) != VERSION:
            raise pickle.UnpicklingError(f"its version is {_told(version)}, not {VERSION}")
        system = _unpickled(file)
        if not (isinstance(system, dict) and system.get("little_endian")):
            raise pickle.UnpicklingError("its numbers are not little-endian")
        content = Noting(file, encoding="utf-8").load()
        places, end = {}, path.stat().st_size
        for key in _unpickled(file):
            count = int.from_bytes(_exactly(file, 8), "little")
            places[key] = file.tell()
            storage = used[key]
            if count != storage.count:
                raise pickle.UnpicklingError(f"a storage has {count} elements, not {storage.count}")
            if file.seek(count * DTYPES[storage.type].itemsize, 1) > end:
                raise EOFError("the file ends in the middle of a storage")
        if absent := sorted(used.keys() - places.keys()):
            raise EOFError(f"the storage {absent[0]!r} is missing")

    def fetch(storage, start, count):
        with path.open("rb") as file:
            file.seek(places[storage.key] + start)
            return _exactly(file, count)

    return content, fetch


def _exactly(file: BufferedIOBase, count: int) -> bytes:
    content = file.read(count)
    if len(content) != count:
        raise EOFError(f"{count} bytes were expected and {len(content)} are there")
    return content
