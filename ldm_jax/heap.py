"""Memory that a process frees and needs again: the C library keeps it instead of handing it back to the kernel.

XLA's programs for the CPU have one buffer each for all that they hold in between. glibc maps what is larger than 32 MB
anew for every call, and the kernel zeroes it page by page when it is first touched: a tenth of the time of a small
network's gradient. Arrays of numpy and torch come from the same heap. What the process once held it then keeps.
"""

import ctypes
import platform
from pathlib import Path

DEVICES = ("nvidia[0-9]*", "accel[0-9]*", "vfio/[0-9]*", "kfd")  # in /dev, of accelerators

# mallopt's parameters (malloc.h) and what they are set to: no array is mapped by itself, nothing is given back, and
# there is one arena, since the others cannot grow beyond 64 MB.
TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8
SETTINGS = {MMAP_THRESHOLD: 2**31 - 1, TRIM_THRESHOLD: 2**31 - 1, ARENA_MAX: 1}


def has_accelerator() -> bool:
    """Whether this machine has one; no backend of jax is started to find out."""
    return any(any(Path("/dev").glob(pattern)) for pattern in DEVICES)


def keep() -> bool:
    """Keeps freed memory for the process, where the CPU computes and glibc allocates; whether it does so now.

    To be called before jax starts its threads. Other C libraries are left as they are: results do not depend on it.
    """
    if has_accelerator() or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(parameter, value) for parameter, value in SETTINGS.items()])
