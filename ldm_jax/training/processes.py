"""Several processes that train one run: how they meet, what they agree on, and how they stop together.

Each process runs the same program on its own devices, and feeds them its share of every batch (`sharding.share`). What
is computed on the mesh is computed by all of them together, so all must take the same steps in the same order; what is
written is written by the first alone. The work directory is one that all of them see.
"""

import contextlib
import datetime
import hashlib
import os
import re
import signal
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils
from jaxtyping import Array, UInt32

from ldm_jax import tree

# Where jax's service for preemptions writes that one of the processes got SIGTERM; all of them can read it.
NOTICE = "RECEIVED_PREEMPTION_NOTICE"
PARTED = "ldm_jax/parted"
A_DAY, A_MINUTE = 86_400_000, 60_000  # milliseconds
# How many of the processes are on this one's host: SLURM ("1(x8)" on each of eight), and Open MPI.
BESIDE = ("SLURM_STEP_TASKS_PER_NODE", "OMPI_COMM_WORLD_LOCAL_SIZE")
VISIBLE = ("jax_cuda_visible_devices", "jax_rocm_visible_devices")
REMEDY = "start all of them with the same config, data, weights and work directory"


def meet(
    distributed: bool = False,
    coordinator: str | None = None,
    process_id: int | None = None,
    num_processes: int | None = None,
) -> None:
    """Joins the other processes of the run, if any are asked for; before any device is touched.

    With `distributed` alone, jax reads address and numbers from the environment: SLURM, Open MPI, GKE, a TPU pod. Of
    several processes on a host each has the GPU of its number there; one alone has all of them.

    Raises:
      ValueError: some of address, own number and number of processes, but not all; or nothing in the environment.
    """
    given = dict(coordinator=coordinator, process_id=process_id, num_processes=num_processes)
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if len(missing) == len(given) and not distributed:
        return
    if 0 < len(missing) < len(given):
        raise ValueError(
            f"{' and '.join(missing)} must be given too: --coordinator HOST:PORT, --process_id and --num_processes "
            "belong together, or --distributed alone where the environment tells them"
        )
    if not missing:
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdigit():
            raise ValueError(f"--coordinator={coordinator} is no address; give HOST:PORT")
        if not 0 <= process_id < num_processes:
            raise ValueError(
                f"--process_id={process_id} must be from 0 to {num_processes - 1}, below --num_processes"
            )
    # A signal to one process is told to all of them.
    jax.config.update("jax_enable_preemption_service", True)
    # jax shows each process of SLURM and of Open MPI one GPU, however many are there for it.
    visible = {name: jax.config.values[name] for name in VISIBLE}
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    except ValueError as error:
        if not missing:
            raise
        raise ValueError(
            f"--distributed: the environment is none that jax knows ({error}); give --coordinator, --process_id and "
            "--num_processes"
        ) from error
    if alone_on_its_host() and "JAX_LOCAL_DEVICE_IDS" not in os.environ:
        for name, value in visible.items():
            jax.config.update(name, value)


def alone_on_its_host() -> bool:
    """Whether SLURM or Open MPI started one process on each host."""
    return any(re.fullmatch(r"1(\(x\d+\))?", os.environ.get(name, "")) for name in BESIDE)


def first() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


def several() -> bool:
    return jax.process_count() > 1


def agree(facts: Mapping[str, str]) -> None:
    """Looks whether every process was told the same; with one process it was.

    Raises:
      ValueError: on every process, with the names of what differs.
    """
    if not several():
        return
    names = sorted(facts)
    mine = [list(hashlib.sha256(facts[name].encode()).digest()) for name in names]
    _compare(names, np.array(mine, np.uint8))


def agree_on_arrays(what: str, arrays: Any) -> None:
    """Looks whether every process holds the same arrays, by a checksum of each.

    Raises:
      ValueError: on every process, with the names of the leaves that differ.
    """
    if not several():
        return
    sums = jax.jit(lambda leaves: [checksum(leaf) for leaf in leaves])(jax.tree.leaves(arrays))
    mine = np.array([np.asarray(s.addressable_data(0)) for s in sums])
    _compare([f"{what} {name}" for name in tree.names(arrays)], mine[:, None])


def checksum(x: Array) -> UInt32[Array, ""]:
    """The sum of an array's bits, 32 at a time, with an odd weight for each place, modulo 2^32.

    Any change of one element changes it. Sums of integers do not depend on their order, nor on the layout.
    """
    x = x if x.dtype.itemsize == 4 else x.astype(jnp.float32)
    bits, weight = jax.lax.bitcast_convert_type(x, jnp.uint32), jnp.uint32(1)
    for axis in range(x.ndim):
        weight = weight + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(
            2654435762 + 2 * axis
        )
    return jnp.sum(bits * weight, dtype=jnp.uint32)


def _compare(names: list[str], mine: np.ndarray) -> None:
    everyone = np.asarray(multihost_utils.process_allgather(mine))
    differs = (everyone != everyone[0]).any(-1)  # [process, name]
    if not differs.any():
        return
    what = [name for name, wrong in zip(names, differs.any(0), strict=True) if wrong]
    shown = ", ".join(what[:4]) + (f" and {len(what) - 4} more" if len(what) > 4 else "")
    who = np.flatnonzero(differs.any(1)).tolist()
    raise ValueError(
        f"the {len(everyone)} processes do not agree on {shown}: {who} differ from process 0; {REMEDY}"
    )


def fetch(x: Array) -> np.ndarray:
    """An array of the mesh on the host of every process."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def stop_here(step: int) -> bool:
    """Whether one of several processes got SIGTERM, and all are to stop at this step; to be asked before every step.

    The answer is the same on all of them: the step after the last that any of them had begun.
    """
    return several() and multihost_utils.reached_preemption_sync_point(step)


def handlers(note: Callable[[int, Any], None]) -> dict[int, Callable[[int, Any], None]]:
    """What to do on a signal: `note` it; with several processes tell all of them (`stop_here`, `noticed`)."""
    if several():
        return dict.fromkeys((signal.SIGTERM, signal.SIGINT), _heard)
    return dict.fromkeys((signal.SIGTERM, signal.SIGINT), note)


def _heard(number: int, frame: Any) -> None:
    # A thread has told the others already, unless the signal came between two watches; and they may be parting.
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        tell()


def tell() -> None:
    """Tells all of several processes that this one got a signal, as jax's own handler of SIGTERM does.

    It takes the place of that one, which does not hear a second signal. Nothing happens where they have parted.
    """
    if _service() is not None:
        _set(NOTICE, datetime.datetime.now(datetime.UTC).isoformat())


def noticed(seconds: float) -> bool:
    """Whether one of several processes got a signal, or gets it within so many seconds."""
    try:
        _service().blocking_key_value_get(NOTICE, round(1000 * seconds))
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        return False
    return True


def go_on_together(what: str) -> bool:
    """Waits until all of several processes are done with `what`; False if they are to leave instead.

    The answer is the same on all of them, and the one that `leave` gives. Each `what` is asked about once.
    """
    _service().wait_at_barrier(f"ldm_jax/{what}", A_DAY)
    return _decided(what, "go on") == "go on"


def leave(what: str) -> bool:
    """Whether several processes, one of which got a signal, leave in the midst of `what`: not if all are done."""
    return _decided(what, "leave") == "leave"


def part() -> None:
    """Returns when all of several processes have come here, and have let go of each other: none minds who ends.

    Raises:
      JaxRuntimeError: after a minute some have not come.
    """
    if several():
        _service().wait_at_barrier(PARTED, A_MINUTE)
        jax.distributed.shutdown()


def _decided(what: str, word: str) -> str:
    """What the first of all processes said to this."""
    _set(f"ldm_jax/{what}", word)
    return _service().blocking_key_value_get(f"ldm_jax/{what}", A_MINUTE)


def _set(key: str, value: str) -> None:
    """Unless it is set."""
    try:
        _service().key_value_set(key, value)
    except jax.errors.JaxRuntimeError as error:
        if "ALREADY_EXISTS" not in str(error):
            raise


def _service() -> Any:
    """The store of keys and the barriers by which jax's processes meet; jax has no public name for it."""
    return distributed.global_state.client
