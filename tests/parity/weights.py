"""Networks of diffusers with random weights, and how far our outputs are from theirs."""

import numpy as np

from ldm_jax.weights import table


def randomised(network, seed=0):
    """Every weight drawn anew, so that no branch is silent and no norm the identity."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in network.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim > 1:
                p.copy_(noise / p[0].numel() ** 0.5)
            else:
                p.copy_(0.2 * noise + ("norm" in name and name.endswith("weight")))
    return network.eval()


def copied(network, shapes, rows):
    """The weights of `network` as our tree of `shapes`."""
    return table.load(rows, shapes, {k: v.numpy() for k, v in network.state_dict().items()})


def relative_error(ours, theirs) -> float:
    """Ours channels last, theirs channels first."""
    theirs = np.moveaxis(theirs.detach().numpy(), 1, -1)
    assert ours.shape == theirs.shape
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
