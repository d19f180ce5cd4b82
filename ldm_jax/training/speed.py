"""How fast a run is and what it holds: pictures, operations and their share of the device's peak, memory."""

import concurrent.futures
import resource
import sys
import time
from collections.abc import Callable

import jax
from absl import logging
from jax.sharding import Mesh

from ldm_jax.foresee.chips import peak

AFTER = 20.0  # seconds


def memory(device: jax.Device) -> float:
    """The most bytes that a device ever held where it says so, else those of this process."""
    held = (device.memory_stats() or {}).get("peak_bytes_in_use")
    if held is not None:
        return float(held)
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


class Speed:
    """What the rate of the steps means.

    `count()` gives the operations of a step, as the model defines them, of the whole batch. It is called in a thread,
    since a large model takes a while, and not before the run has lasted `AFTER` seconds: shorter ones need no rate.
    """

    def __init__(self, batch: int, mesh: Mesh, count: Callable[[], int] | None):
        self.batch, self.device, self.devices = batch, mesh.local_devices[0], mesh.devices.size
        self._began, self._count, self._counting = time.perf_counter(), count, None

    def _begin(self) -> None:
        thread = concurrent.futures.ThreadPoolExecutor(1)
        self._counting = thread.submit(self._count)
        thread.shutdown(wait=False)

    def of(self, steps_per_second: float | None) -> dict[str, float]:
        """`memory_gb`, and of a rate `images_per_second`, `tflops` (a second) and, of a device we know, `mfu`."""
        values = {"memory_gb": memory(self.device) / 1e9}
        if steps_per_second is None:
            return values
        values["images_per_second"] = self.batch * steps_per_second
        if self._counting is None:
            if self._count is not None and time.perf_counter() - self._began >= AFTER:
                self._begin()
        elif self._counting.done():
            if error := self._counting.exception():
                logging.warning("operations are not counted: %s", error)
                self._counting = self._count = None
                return values
            rate = self._counting.result() * steps_per_second
            values["tflops"] = rate / 1e12
            if (of_one := peak(self.device.device_kind)) is not None:
                values["mfu"] = rate / (of_one * self.devices)
        return values
