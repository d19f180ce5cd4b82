"""What TPUs can do, by their makers' tables, and the topologies of them that can be compiled for without one.

Source: docs.cloud.google.com/tpu/docs/{v4, v5e, v5p, v6e, tpu7x}, "System architecture", read in 2026. The bandwidth of
the interconnect is one way, half of the "bidirectional" figure there; for v4, 2400 Gbit/s of the older tables. Of
GPUs the rate alone is here, for runs on them.
"""

import importlib.util
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

GB, TB, GIB = 1e9, 1e12, 2**30


class Chip(NamedTuple):
    """Per second and chip; `devices` is how many of them jax sees in a chip."""

    memory: float  # bytes of HBM
    flops: float  # of bfloat16 products
    bandwidth: float  # bytes from and to HBM
    links: float  # bytes that leave over the interconnect
    devices: int = 1

    def of_device(self) -> "Chip":
        share = self.devices
        return Chip(*(value / share for value in self[:4]))


CHIPS = {
    "v4": Chip(32 * GIB, 275e12, 1228 * GB, 300 * GB),
    "v5e": Chip(16 * GIB, 197e12, 819 * GB, 200 * GB),
    "v5p": Chip(95 * GIB, 459e12, 2765 * GB, 600 * GB),
    "v6e": Chip(32 * GIB, 918e12, 1638 * GB, 400 * GB),
    "tpu7x": Chip(192 * GIB, 2307e12, 7380 * GB, 600 * GB, devices=2),
}
# What jax calls their devices: the beginning of the name.
NAMES = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}
# Dense bfloat16 operations a second of GPUs, from their maker's data sheets, likewise.
GPU_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
}
# Of what libtpu 0.0.51 knows: whole slices as they are rented.
SHAPES = {
    "v4": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4"),
    "v5e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v5p": ("2x2x1", "2x2x2", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
    "v6e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "tpu7x": ("2x2x1", "2x2x2", "2x4x4", "4x4x4", "4x4x8"),
}
GPUS = ("gpu", "cuda", "rocm", "a100", "h100", "h200", "b200", "gb200", "l4", "v100", "mi300")
# libtpu would look for a TPU and for the machine that it is in, and would let one process alone have it.
WITHOUT_TPU = dict(
    TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost", ALLOW_MULTIPLE_LIBTPU_LOAD="1"
)


def peak(kind: str) -> float | None:
    """Operations a second of a device that jax calls so; None if we do not know it (a CPU)."""
    known = {name: CHIPS[chip].of_device().flops for name, chip in NAMES.items()} | GPU_FLOPS
    names = [name for name in known if kind.startswith(name)]
    return known[max(names, key=len)] if names else None


def named(topology: str) -> Chip:
    """The chip of a topology such as "v5e:16x16".

    Raises:
      ValueError: a GPU's, or one that is not known; says which are.
    """
    generation = topology.split(":")[0]
    if generation.lower().startswith(GPUS):
        raise ValueError(
            f"--topology={topology}: programs for GPUs can only be compiled where such a GPU is; "
            "run there, or give a TPU's topology such as v5e:16x16"
        )
    if generation not in CHIPS:
        raise ValueError(f"--topology={topology} is unknown; {_known()}")
    return CHIPS[generation]


def _known() -> str:
    return "these are known: " + ", ".join(f"{g}:{'|'.join(s)}" for g, s in SHAPES.items())


def devices(topology: str, slices: int = 1) -> Sequence[Any]:
    """The devices of a topology, to compile for; no TPU is needed.

    Raises:
      ValueError: libtpu, the compiler, is not installed, or a topology that it does not know.
    """
    named(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            "libtpu, which compiles for TPUs, is not installed; pip install 'ldm_jax[tpu]' (or pip install libtpu)"
        )
    for name, value in WITHOUT_TPU.items():
        os.environ.setdefault(name, value)
    more = {} if slices == 1 else {"num_slices": slices}
    try:
        described = topologies.get_topology_desc(topology, platform="tpu", **more)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"--topology={topology}: {reason}; {_known()}") from error
    return described.devices
