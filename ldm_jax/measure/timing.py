"""Seconds, rates and memory, as a device gives them."""

import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from ldm_jax import heap

Run = Callable[[], Any]


class Spent(NamedTuple):
    """Seconds of each run."""

    wall: Sequence[float]
    busy: Sequence[float]  # of the CPU, all threads together

    def summary(self) -> dict[str, float]:
        return {
            "seconds": float(np.median(self.wall)),
            "seconds_p90": float(np.quantile(self.wall, 0.9)),
            "cpu_seconds": float(np.median(self.busy)),
        }


def interleaved(runs: Mapping[str, Run], repeats: int) -> dict[str, Spent]:
    """The runs in turn, so that whatever slows the machine down slows all of them; one turn of each warms up.

    A run returns when its work is done.
    """
    for run in runs.values():
        run()
    spent = {name: Spent([], []) for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            busy, wall = time.process_time(), time.perf_counter()
            run()
            spent[name].wall.append(time.perf_counter() - wall)
            spent[name].busy.append(time.process_time() - busy)
    return spent


def parts_in_turn(
    runs: Mapping[str, Mapping[str, Run]], repeats: int
) -> dict[str, dict[str, Spent]]:
    """{who: {part: seconds}} of {who: {part: run}}; one part after the other, each as `interleaved`."""
    spent: dict[str, dict[str, Spent]] = {by: {} for by in runs}
    for name in dict.fromkeys(name for parts in runs.values() for name in parts):
        having = {by: parts[name] for by, parts in runs.items() if name in parts}
        for by, of in interleaved(having, repeats).items():
            spent[by][name] = of
    return spent


def ratio(of: Sequence[float], to: Sequence[float]) -> float:
    """The median of the ratios of pairs."""
    return float(np.median(np.asarray(of) / np.asarray(to)))


def pin_without_accelerator() -> bool:
    """Confines this process to one core if the machine has no accelerator; before jax and torch start their threads.

    On a shared CPU the seconds of one pinned thread are what can be compared.
    """
    if heap.has_accelerator():
        return False
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
    )
    return True


def now() -> float:
    """A clock's seconds; of the CPU where it is the device, which others may use as well."""
    return time.process_time() if jax.default_backend() == "cpu" else time.perf_counter()


def compile_seconds(f: Any, *args: Any) -> tuple[Any, dict[str, float]]:
    """The compiled function; the seconds (see `now`) until it is there, at first and then from the
    persistent cache.

    Both include tracing. The cache is a fresh one, and the one in use is in use again after it.
    """
    usual = jax.config.jax_compilation_cache_dir
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            _use_cache(folder, 0.0)
            for _ in range(2):
                jax.clear_caches()
                began = now()
                compiled = f.lower(*args).compile()
                seconds.append(now() - began)
        finally:
            _use_cache(usual, least)
    return compiled, {"compile_seconds": seconds[0], "compile_seconds_cached": seconds[1]}


def _use_cache(folder: str | None, least: float) -> None:
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
    compilation_cache.reset_cache()


def matmul_rate(dtype: Any) -> float:
    """Operations a second of a large matrix product on this device, the best of five measurements."""
    n, calls = (1024, 4) if jax.default_backend() == "cpu" else (8192, 16)
    x = jnp.ones((n, n), dtype)
    product = jax.jit(lambda x: x @ x).lower(x).compile()
    best = math.inf
    for _ in range(6):  # the first one warms up
        began = now()
        jax.block_until_ready([product(x) for _ in range(calls)])
        best = min(best, now() - began)
    return 2 * n**3 * calls / best


def memory(compiled: Any) -> dict[str, int]:
    """Bytes: of the compiled program, and the most that the device ever held where it says so."""
    found = compiled.memory_analysis()
    program = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
    held = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return {"program_bytes": program} | ({} if held is None else {"peak_bytes": held})


def xla_flops(compiled: Any) -> float:
    """XLA's count: the body of a loop is taken once."""
    return float(compiled.cost_analysis()["flops"])
