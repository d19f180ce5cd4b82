"""LPIPS against the lpips package, with the published weights of its channels on a random trunk."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.quality import perceptual
from ldm_jax.weights import files
from tests.parity import vision

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def theirs():
    vision.available()
    lpips = pytest.importorskip("lpips")
    torch.manual_seed(0)
    return lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False), Path(lpips.__file__).parent


def pairs(seed, n=3, side=48):
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 1, (n, side, side + 16, 3)).astype(np.float32)
    noise = 0.3 * rng.standard_normal(x.shape).astype(np.float32)
    return x, np.clip(x + noise, -1, 1)


def expected(network, x, y):
    with torch.no_grad():
        return network(*(torch.tensor(np.moveaxis(a, -1, 1)) for a in (x, y))).numpy().ravel()


def test_from_the_two_published_files(theirs, tmp_path):
    """The trunk as torchvision keeps it, with its classifier; the vectors as the package ships them."""
    import torchvision

    network, package = theirs
    vgg = torchvision.models.vgg16(weights=None)
    own = [m for m in network.net.modules() if isinstance(m, torch.nn.Conv2d)]
    same = [m for m in vgg.features if isinstance(m, torch.nn.Conv2d)]
    for target, given in zip(same, own, strict=True):
        target.load_state_dict(given.state_dict())
    vgg.classifier = torch.nn.Sequential(torch.nn.Linear(8, 4))  # small: it is not read
    torch.save(vgg.state_dict(), tmp_path / "vgg16.pth")
    distance = perceptual.distance([tmp_path / "vgg16.pth", package / "weights/v0.1/vgg.pth"])
    x, y = pairs(0)
    wanted = expected(network, x, y)
    assert wanted.min() > 0.01
    np.testing.assert_allclose(distance(jnp.asarray(x), jnp.asarray(y)), wanted, atol=1e-5)


def test_from_the_state_dict_of_the_whole_model(theirs, tmp_path):
    network, _ = theirs
    tensors = {k: v.numpy() for k, v in network.state_dict().items()}
    files.write(tmp_path / "lpips.safetensors", tensors)
    x, y = pairs(1)
    distance = perceptual.distance([tmp_path / "lpips.safetensors"])
    found = distance(jnp.asarray(x), jnp.asarray(y))
    np.testing.assert_allclose(found, expected(network, x, y), atol=1e-5)
