"""PatchGAN against a torch network of the same layers, in training mode."""

import jax
import numpy as np
import pytest

from ldm_jax.models import discriminator

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity


def twin(width, layers, channels=3):
    """Convolution, batch norm, leaky ReLU: as listed in the appendix of Isola et al. 2017."""
    nn = torch.nn
    stack = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
    before = width
    for i in range(1, layers + 1):
        after = width * min(2**i, 8)
        stack += [
            nn.Conv2d(before, after, 4, 2 if i < layers else 1, 1, bias=False),
            nn.BatchNorm2d(after),
            nn.LeakyReLU(0.2),
        ]
        before = after
    return nn.Sequential(*stack, nn.Conv2d(before, 1, 4, 1, 1))


def copied(network):
    """The parameters of the torch network under our names."""
    convs = [m for m in network if isinstance(m, torch.nn.Conv2d)]
    norms = [m for m in network if isinstance(m, torch.nn.BatchNorm2d)]
    params = {}
    for i, conv in enumerate(convs):
        name = "conv_out" if i == len(convs) - 1 else f"conv_{i}"
        params[name] = {"kernel": conv.weight.detach().permute(2, 3, 1, 0).numpy()}
        if conv.bias is not None:
            params[name]["bias"] = conv.bias.detach().numpy()
    for i, norm in enumerate(norms, start=1):
        params[f"norm_{i}"] = {
            "scale": norm.weight.detach().numpy(),
            "bias": norm.bias.detach().numpy(),
        }
    return {"params": params}


@pytest.mark.parametrize(("layers", "size"), [(3, 33), (2, 16)])
def test_scores_equal_those_of_torch_in_training_mode(layers, size):
    torch.manual_seed(0)
    network = twin(8, layers).train()
    for norm in (m for m in network if isinstance(m, torch.nn.BatchNorm2d)):
        torch.nn.init.normal_(norm.weight, 1, 0.1)
        torch.nn.init.normal_(norm.bias, 0, 0.1)
    x = torch.randn(3, 3, size, size)
    expected = network(x).detach().permute(0, 2, 3, 1).numpy()
    model = discriminator.PatchGAN(width=8, layers=layers)
    y = jax.jit(model.apply)(copied(network), x.permute(0, 2, 3, 1).numpy())
    np.testing.assert_allclose(y, expected, atol=1e-5)


def test_the_parameter_count_of_the_torch_network():
    assert sum(p.numel() for p in twin(64, 3).parameters()) == 2_765_633
