"""Compiled train steps that are kept between processes, so that a run that starts again need not trace its step.

JAX's cache of compiled programs is asked with the program itself, which has to be traced and lowered first, and only
then is the executable loaded. Here the question is a digest of all that the program follows from (`digest`), known as
soon as the config is: the executable is loaded in a thread, outside of the interpreter's lock, while data, codec and
parameters are made. What is loaded is what was compiled: the same machine code, the same bits.
"""

import concurrent.futures
import contextlib
import hashlib
import importlib.metadata
import json
import os
import pickle
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import logging
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "numpy")  # whose code a step is made of, beside ours
PACKAGE = Path(__file__).parent.parent
KEPT = 8  # executables; the ones that were used last
OF_STEPS = "train_steps"  # a folder in JAX's cache of compiled programs

Call = Callable[..., tuple[Any, dict[str, Any]]]  # (state, frozen, batch, rng) -> (state, metrics)


class Kept(NamedTuple):
    """Where the executable of a step lies or will lie, and the one that is being loaded from there, if there is."""

    path: Path
    devices: tuple[Any, ...]
    loading: concurrent.futures.Future | None


def digest(values: Any, files: Iterable[Path] = (), devices: Sequence[Any] = ()) -> str:
    """Of all that a compiled step follows from, beside its inputs' shapes: sha256.

    That is `values` (JSON: the config ...), the contents of `files`, this package's code, the libraries' versions, the
    machine and its devices, and the settings of JAX and XLA.
    """
    found = hashlib.sha256()
    for path in [*sorted(PACKAGE.rglob("*.py")), *files]:
        content = path.read_bytes() if path.is_file() else b""
        found.update(f"{path.name} {len(content)}\n".encode() + content)
    settings = {k: repr(v) for k, v in jax.config.values.items() if "cache" not in k}
    environment = {k: v for k, v in os.environ.items() if k.startswith(("XLA_", "LIBTPU_"))}
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    kinds = [(d.platform, d.device_kind, d.id) for d in devices]
    client = devices[0].client.platform_version if devices else ""
    machine = (sys.version, kinds, client, _processor())
    described = (values, settings, environment, versions, machine)
    found.update(json.dumps(described, sort_keys=True, default=repr).encode())
    return found.hexdigest()


def _processor() -> str:
    """What the processor can do, as Linux tells it; code that is compiled for one may not run on another."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def begin(key: str, devices: Sequence[Any]) -> Kept | None:
    """Starts to load the executable with that digest; None where nothing is kept.

    Nothing is without a folder for compiled programs, and with several processes.
    """
    folder = jax.config.jax_compilation_cache_dir
    if not folder or "://" in folder or jax.process_count() > 1:
        return None
    path = Path(folder) / OF_STEPS / key
    loading = None
    if path.is_file():
        reader = concurrent.futures.ThreadPoolExecutor(1)
        loading = reader.submit(_read, path, tuple(devices))
        reader.shutdown(wait=False)
    return Kept(path, tuple(devices), loading)


def finish(
    kept: Kept | None,
    step: Call,
    out: Any,
    inputs: tuple[Any, ...],
    options: Mapping[str, Any] | None = None,
) -> Call:
    """The compiled step for inputs like these: the one that was kept, else it is compiled, and kept from now on.

    `step` donates its state; `out` are the layouts of what it returns, and `options` what the compiler is told beside.
    """
    found = None if kept is None else _loaded(kept, inputs)
    if found is not None:
        loaded, names = found
    else:
        on_cpu = kept is not None and kept.devices[0].platform == "cpu"
        with _anew() if on_cpu else contextlib.nullcontext():
            program, names = lowered(step, out, inputs)
            loaded = program.compile(compiler_options=dict(options or {}))
        if kept is not None:
            sizes = [len(jax.tree.leaves(given)) for given in inputs]
            _write(kept.path, loaded, (sizes, _described(inputs), names))
    whole = jax.tree.structure(inputs[0])

    def call(*inputs):
        state, metrics = loaded(*map(jax.tree.leaves, inputs))
        return whole.unflatten(state), dict(zip(names, metrics, strict=True))

    return call


def lowered(step: Call, out: Any, inputs: tuple[Any, ...]) -> tuple[Any, list[str]]:
    """The program of a step, as `train.py` and `ldm_jax.compile` have it compiled, and the names of its metrics.

    `inputs` are arrays or shapes with layouts. The program takes and gives lists of leaves, which can be told without a
    state at hand; JAX's cache of compiled programs knows it by its text.
    """
    leaves = [jax.tree.leaves(i) for i in inputs]
    trees = [jax.tree.structure(i) for i in inputs]
    names = []

    def train_step(*given):
        state, metrics = step(*(t.unflatten(g) for t, g in zip(trees, given, strict=True)))
        names[:] = sorted(metrics)
        return jax.tree.leaves(state), [metrics[name] for name in names]

    layouts = (jax.tree.leaves(out[0]), out[1])
    return jax.jit(train_step, donate_argnums=0, out_shardings=layouts).lower(*leaves), names


def _loaded(kept: Kept, inputs: tuple[Any, ...]) -> tuple[Any, list[str]] | None:
    """The executable that was kept and the names of its metrics; None if there is none that can be read."""
    if kept.loading is None:
        return None
    try:
        loaded, described, names = kept.loading.result()
    except (ValueError, OSError, pickle.UnpicklingError, jax.errors.JaxRuntimeError) as error:
        first = str(error).split("\n")[0]
        logging.warning("%s could not be loaded and is made anew: %s", kept.path, first)
        return None
    if described != _described(inputs):
        raise RuntimeError(
            f"{kept.path} was compiled for other inputs, although its digest is the same; remove this file"
        )
    return loaded, names


@contextlib.contextmanager
def _anew() -> Iterator[None]:
    """Compiles without JAX's cache: what XLA's CPU backend loads from there, it cannot write again as a whole."""
    before = jax.config.jax_enable_compilation_cache
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # which has decided already whether it is used
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def _described(inputs: Any) -> list[str]:
    """Names, shapes and types of all inputs."""
    paths, _ = jax.tree_util.tree_flatten_with_path(inputs)
    return [f"{jax.tree_util.keystr(k)} {jax.typeof(v).str_short()}" for k, v in paths]


def _read(path: Path, devices: tuple[Any, ...]) -> tuple[Any, list[str], list[str]]:
    content = path.read_bytes()
    told, content = content[:64], content[64:]
    if hashlib.sha256(content).hexdigest().encode() != told:
        raise ValueError("its contents are damaged")
    serialized, sizes, described, names = pickle.loads(content)
    lists = [[0] * n for n in sizes]
    loaded = serialize_executable.deserialize_and_load(
        serialized,
        jax.tree.structure((tuple(lists), {})),
        jax.tree.structure((lists[0], names)),
        execution_devices=devices,
    )
    os.utime(path)
    return loaded, described, names


def _write(path: Path, made: Any, about: tuple[list[int], list[str], list[str]]) -> None:
    """Keeps an executable, or says why not; the run does not depend on it."""
    temporary = path.with_suffix(f".{os.getpid()}")
    try:
        content = pickle.dumps((serialize_executable.serialize(made)[0], *about))
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(hashlib.sha256(content).hexdigest().encode() + content)
        os.replace(temporary, path)
        older = sorted(path.parent.iterdir(), key=lambda p: p.stat().st_mtime)[:-KEPT]
        for one in older:
            one.unlink(missing_ok=True)
    except (ValueError, OSError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
        logging.warning("the compiled step is not kept: %s", str(error).split("\n")[0])
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
