"""How gradients are joined before chips add them up: a few large all-reduces instead of many.

Data parallel, each gradient is the sum of what every chip found on its rows. XLA adds arrays of one type up together,
in the order in which they are ready: for TPUs until they hold 120 MiB or are 256 in number (libtpu 0.0.51). A U-Net of
400 million parameters, a thousand arrays in bfloat16 and float32, so came to eight all-reduces. All of them are waited
for before the update anyway, since it looks at the norm of the whole gradient; fewer begin and end less often.
"""

from collections.abc import Sequence
from typing import Any

import jax

from ldm_jax.types import Params

TPUS_OWN = 120 * 2**20  # bytes that libtpu joins by itself
PARTS = 3  # into which gradients in the parameters' type go; in bfloat16 they are half of that
ARRAYS = 2**20  # more than any network has


def options(devices: Sequence[Any], params: Params) -> dict[str, Any]:
    """What the compiler is told of a train step, beside the program: by how much it joins the gradients of `params`.

    Nothing where there is one device, or none of a TPU: XLA's own choice. `params` are arrays or shapes.
    """
    if len(devices) == 1 or devices[0].platform != "tpu":
        return {}
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    return {
        "xla_jf_crs_combiner_threshold_in_bytes": max(TPUS_OWN, -(-size // PARTS)),
        "xla_jf_crs_combiner_threshold_count": ARRAYS,
    }
