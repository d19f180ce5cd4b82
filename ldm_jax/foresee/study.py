"""A compiled program held against a chip: what it keeps in memory, computes, reads and sends, and how fast it can be.

The roofline (Williams et al. 2009): a step takes at least as long as its products at the chip's peak rate, its traffic
with HBM, or its traffic with other chips, whichever is longest; a real step overlaps them less well. The bound on the
model FLOP utilisation (Chowdhery et al. 2022) counts what the model needs and not what `remat` computes again.
"""

import concurrent.futures
import re
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from ldm_jax.foresee import collectives, text
from ldm_jax.foresee.chips import Chip


class Program(NamedTuple):
    """Something to compile: a function, the shapes and layouts of its inputs by name, and those of what it returns."""

    call: Callable[..., Any]
    inputs: Mapping[str, Any]  # in the order of the function's arguments
    layouts: Any = None  # of what it returns; None: XLA's choice
    donated: tuple[int, ...] = ()
    batch: int = 1  # rows on all devices
    options: Mapping[str, Any] | None = None  # what the compiler is told beside
    # To what is compiled, if not `call` on `inputs` one by one.
    lower: Callable[[], Any] | None = None


class DoesNotFit(RuntimeError):
    """The compiler found that a program needs more memory than a chip has: `needed` bytes, 0 where it does not tell."""

    def __init__(self, message: str, needed: float = 0.0):
        super().__init__(message)
        self.needed = needed


class Spent(NamedTuple):
    """Seconds that a compilation took."""

    wall: float
    cpu: float  # of all threads together


def on_device(arrays: Any) -> int:
    """Bytes of arrays on one device, by shapes and layouts."""

    def one(leaf):
        shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
        size = 8 if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize
        return int(np.prod(shape)) * size

    return sum(one(leaf) for leaf in jax.tree.leaves(arrays))


def compile_program(
    program: Program, mesh: Mesh, until: Callable[[], Any] = lambda: None
) -> tuple[Any, Spent]:
    """The executable, and what it took to trace, lower and compile.

    As soon as `until` returns something while it compiles, that is returned in place of the executable, and the
    compilation goes on in a thread, which the end of the process ends.

    Raises:
      DoesNotFit: it needs more memory than the chips have.
    """
    began = time.perf_counter(), time.process_time()
    lowered = program.lower() if program.lower else _lowered(program, mesh)
    compiling: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def compile_it():
        try:
            compiling.set_result(lowered.compile(compiler_options=dict(program.options or {})))
        except Exception as error:  # whatever it is, it is told below
            compiling.set_exception(error)

    # Of an executor's thread the process would wait for the end.
    threading.Thread(target=compile_it, daemon=True).start()
    try:
        made = None
        while made is None:
            concurrent.futures.wait([compiling], timeout=1)
            made = compiling.result() if compiling.done() else until()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        lines = [line.strip() for line in str(error).splitlines()]
        told = [line for line in lines if "Used " in line or "exceeded scoped" in line]
        message = " ".join(told) or lines[0]
        raise DoesNotFit(message, _needed(message)) from error
    return made, Spent(time.perf_counter() - began[0], time.process_time() - began[1])


def _lowered(program: Program, mesh: Mesh) -> Any:
    # Not `jax.set_mesh`: numbers that are computed while tracing would be asked of devices that are not there.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        jitted = jax.jit(
            program.call, donate_argnums=program.donated, out_shardings=program.layouts
        )
        return jitted.lower(*program.inputs.values())


def _needed(message: str) -> float:
    """Bytes of "Used 17.23G of 15.75G hbm"."""
    told = re.search(r"Used ([\d.]+)([KMGT]?)", message)
    return float(told[1]) * 1024.0 ** " KMGT".index(told[2] or " ") if told else 0.0


class Laid(NamedTuple):
    """What a compiled program is held against a chip by."""

    text: str
    memory: Mapping[str, int]  # bytes: "peak", and more where there is an executable
    cost: Mapping[str, float]  # "flops" and "bytes" by XLA, where there is an executable


def executable(made: Any, written: str | None = None) -> Laid:
    """Of an executable; its text is `written` where jax cannot read it, as with some asynchronous operations."""
    memory, cost = made.memory_analysis(), made.cost_analysis()
    try:
        program_text = made.as_text()
    except jax.errors.JaxRuntimeError:
        if written is None:
            raise
        program_text = written
    sizes = {
        "inputs_by_xla": memory.argument_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "output": memory.output_size_in_bytes,
        "peak": memory.peak_memory_in_bytes,
    }
    counted = {"flops": float(cost["flops"]), "bytes": float(cost["bytes accessed"])}
    return Laid(program_text, sizes, counted)


def study(
    laid: Laid,
    program: Program,
    mesh: Mesh,
    chip: Chip,
    model_flops: int,
    executed_flops: int,
    foreseen: Mapping[str, float],
) -> dict[str, Any]:
    """Figures of a compiled program; sizes, operations and times are of one device.

    `model_flops` and `executed_flops` are our own counts of the whole program, without and with what is computed again;
    `foreseen` says what memory was expected, in bytes by kind.
    """
    device, count = chip.of_device(), mesh.size
    kept = {name: on_device(arrays) for name, arrays in program.inputs.items()}
    own, done = model_flops / count, executed_flops / count
    found, moved = collectives.read(laid.text), text.traffic(laid.text)
    xla = {name: {"xla": laid.cost[name]} if laid.cost else {} for name in ("flops", "bytes")}
    times = {
        "compute": done / device.flops,
        "memory": moved / device.bandwidth,
        "links": collectives.moved(found) / device.links,
    }
    step = max(times.values())
    return {
        "devices": count,
        "batch_per_device": program.batch / count,
        "memory": {
            "inputs": kept,
            **laid.memory,
            "of": device.memory,
            "foreseen": dict(foreseen),
        },
        "flops": {"model": own, "executed": done, "peak_rate": device.flops} | xla["flops"],
        "bytes": {"hbm": moved} | xla["bytes"],
        "intensity": {
            "program": done / moved,
            "chip": device.flops / device.bandwidth,
        },
        "collectives": collectives.summary(found),
        "seconds": times | {"bound": step},
        "bound_by": max(times, key=times.get),
        "mfu_bound": own / device.flops / step,
        "rows_per_second_bound": program.batch / step,
    }


def told(figures: Mapping[str, Any]) -> str:
    """The figures as lines for people."""
    memory, flops, times = figures["memory"], figures["flops"], figures["seconds"]
    lines = [
        f"{figures['batch_per_device']:g} row(s) of the batch on each of {figures['devices']} devices",
        f"memory of a device: {_mib(memory['peak'])} at the peak, of {_mib(memory['of'])}",
        f"  {_mib(sum(memory['foreseen'].values()))}  foreseen",
    ]
    inputs = sum(memory["inputs"].values())
    lines += [f"  {_mib(size)}  {name}" for name, size in memory["inputs"].items()]
    by_xla = "", ""
    if "code" in memory:
        lines += [
            f"  {_mib(memory['inputs_by_xla'])}  all inputs as they lie in tiles ({_mib(inputs)} without)",
            f"  {_mib(memory['temporary'])}  temporary",
            f"  {_mib(memory['code'])}  code",
        ]
        by_xla = (
            f", {flops['xla'] / 1e12:.4f} by XLA",
            f" ({figures['bytes']['xla'] / 1e9:.2f} by XLA, which counts what stays in the chip too)",
        )
    else:
        lines.append("the chips' code was not made: what kernels need of VMEM is not known")
    lines += [
        f"TFLOP: {flops['model'] / 1e12:.4f} of the model, {flops['executed'] / 1e12:.4f} executed{by_xla[0]}",
        f"bytes to and from HBM: {figures['bytes']['hbm'] / 1e9:.2f} GB{by_xla[1]}",
        f"intensity: {figures['intensity']['program']:.0f} FLOP a byte; the chip's own is "
        f"{figures['intensity']['chip']:.0f}",
    ]
    for kind, of in figures["collectives"].items():
        small = f" ({of['small']} of them small)" if of["small"] else ""
        lines.append(f"{kind}: {of['count']}{small}, {of['bytes'] / 2**20:.1f} MiB")
    lines += [
        "at least "
        + ", ".join(
            f"{name} {1e3 * times[name]:.2f} ms" for name in ("compute", "memory", "links")
        ),
        f"bound by {figures['bound_by']}: MFU at most {100 * figures['mfu_bound']:.1f} %, "
        f"{figures['rows_per_second_bound']:.0f} rows a second on all devices",
    ]
    return "\n".join(lines)


def _mib(size: int | float) -> str:
    return f"{size / 2**20:10,.2f} MiB"
