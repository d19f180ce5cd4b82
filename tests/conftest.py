"""Every test sees eight host devices, so that sharded and single-device code run in one process.

Tests compile much and compute little: XLA leaves out most optimisations.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
