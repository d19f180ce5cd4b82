"""Files that torch.save writes, zipped and not, read without torch: the same numbers."""

import subprocess
import sys
from collections import OrderedDict

import ml_dtypes
import numpy as np
import pytest

from ldm_jax.weights import pickles

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity

TYPES = [
    *("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8"),
    "bool",
]
NEW_TYPES = ["uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2"]


def tensors(types):
    generator = torch.Generator().manual_seed(0)
    big = torch.randn(3, 4, 5, generator=generator)
    found = {t: (big * 10).abs().to(getattr(torch, t)) for t in types}
    return found | {
        "turned": big.permute(2, 0, 1),
        "part": big[1:, ::2, 1:4],
        "shared": big.view(-1)[7:],
        "expanded": big[:1, :1, :1].expand(2, 3, 4),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(big.clone()),
        "channels last": big[None].contiguous(memory_format=torch.channels_last),
    }


def as_numpy(tensor):
    if tensor.dtype == torch.bfloat16:
        return tensor.float().numpy().astype(ml_dtypes.bfloat16)
    if "float8" in str(tensor.dtype):
        return tensor.float().numpy().astype(getattr(ml_dtypes, str(tensor.dtype)[6:]))
    return tensor.detach().numpy()


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("zipped", [True, False])
def test_every_type_and_view(zipped, protocol, tmp_path):
    theirs = OrderedDict(tensors([*TYPES, *NEW_TYPES] if zipped else TYPES))
    theirs._metadata = {"": {"version": 1}}
    torch.save(
        {"state_dict": theirs, "epoch": 1, "args": torch.device("cpu")},
        tmp_path / "a.ckpt",
        _use_new_zipfile_serialization=zipped,
        pickle_protocol=protocol,
    )
    ours = pickles.read(tmp_path / "a.ckpt")
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        expected, got = as_numpy(tensor), np.asarray(ours[name])
        assert got.dtype == expected.dtype, name
        assert got.shape == tuple(tensor.shape) == ours[name].shape
        assert got.tobytes() == np.ascontiguousarray(expected).tobytes(), name


@pytest.mark.parametrize("zipped", [True, False])
def test_the_weights_of_a_network_with_its_optimizer(zipped, tmp_path):
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    optimizer = torch.optim.Adam(network.parameters())
    network(torch.ones(1, 3, 5, 5)).sum().backward()
    optimizer.step()
    content = {"state_dict": network.state_dict(), "optimizer": optimizer.state_dict()}
    path = tmp_path / "a.pth"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    ours = pickles.read(path)
    for name, tensor in network.state_dict().items():
        np.testing.assert_array_equal(ours[name], tensor.numpy())
    torch.save(network, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"torch\.nn\.modules\.container\.Sequential"):
        pickles.read(path)


def test_reading_does_not_import_torch(tmp_path):
    torch.save({"w": torch.ones(3)}, tmp_path / "a.bin")
    program = (
        "import sys; from ldm_jax.weights import pickles; import numpy as np;"
        f"np.asarray(pickles.read({str(tmp_path / 'a.bin')!r})['w']); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
