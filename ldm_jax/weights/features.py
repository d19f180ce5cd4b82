"""Files of the networks that judge pictures: Inception-v3, and LPIPS on VGG16.

Inception: `pt_inception-2015-12-05-6726825d.pth` of pytorch-fid, and `weights-inception-2015-12-05-6726825d.pth` of
torch-fidelity, which name the same tensors alike.

LPIPS lies in two files: the trunk is torchvision's `vgg16-397923af.pth` ("features.0.weight", ...), the five vectors of
weights are `vgg.pth` of the lpips package, version 0.1 ("lin0.model.1.weight", ...). The state dict of its whole model
has both ("net.slice1.0.weight", ...) and is read, too.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from ldm_jax.models.features import VGG16_BLOCKS
from ldm_jax.weights import files, pickles
from ldm_jax.weights.table import Row, Table


def _units(ours: str, theirs: str) -> Table:
    return (
        Row(f"params/{ours}/conv", f"{theirs}.conv"),
        Row(f"params/{ours}/bn", f"{theirs}.bn"),
        Row(f"batch_stats/{ours}/bn/mean", f"{theirs}.bn.running_mean"),
        Row(f"batch_stats/{ours}/bn/var", f"{theirs}.bn.running_var"),
    )


INCEPTION = (
    *_units("{block}/{branch}", "{block}.{branch}"),
    *_units("{unit}", "{unit}"),
    Row("params/fc", "fc"),
)
INCEPTION_IGNORED = (r".*\.num_batches_tracked",)  # a count that newer versions of torch store


def _trunk() -> list[tuple[str, int, int]]:
    """Our convolutions, with the numbers of their block and of their place in torchvision's `features`."""
    found, place = [], 0
    for block, (_, depth) in enumerate(VGG16_BLOCKS, start=1):
        for i in range(1, depth + 1):
            found.append((f"params/trunk/conv{block}_{i}", block, place))
            place += 2  # the convolution and its ReLU
        place += 1  # the pool
    return found


LINEAR = tuple(
    Row(f"params/weight_{i}", f"lin{i}.model.1.weight") for i in range(len(VGG16_BLOCKS))
)


def lpips_table(names: Collection[str]) -> Table:
    """`models.lpips.LPIPS`, for the tensors of these names."""
    whole = any(name.startswith("net.slice") for name in names)
    trunk = tuple(
        Row(ours, f"net.slice{block}.{place}" if whole else f"features.{place}")
        for ours, block, place in _trunk()
    )
    return (*trunk, *LINEAR)


# torchvision's classifier; the copies of the vectors, and constants, in the state dict of the whole model.
LPIPS_IGNORED = (r"classifier\..*", r"lins\..*", r"scaling_layer\..*")


def read(paths: Sequence[str | Path]) -> dict[str, Any]:
    """The tensors of one file or of several together, safetensors or torch's by the name's ending.

    Raises:
      FileNotFoundError, ValueError: see `files.read` and `pickles.read`; a tensor that is in two files.
    """
    tensors: dict[str, Any] = {}
    for path in map(Path, paths):
        found = (files if path.suffix == ".safetensors" else pickles).read(path)
        if twice := sorted(tensors.keys() & found.keys()):
            raise ValueError(
                f"{path} has {twice[0]!r}, which another of the files has; give one of them"
            )
        tensors |= found
    return tensors
