"""Resizing without a filter against PyTorch's, which has OpenCV's conventions."""

import numpy as np
import pytest

from ldm_jax.data import degradation

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity


@pytest.mark.parametrize(("ours", "theirs"), [("linear", "bilinear"), ("cubic", "bicubic")])
@pytest.mark.parametrize("size", [(9, 13), (40, 50)])
def test_resizes_are_those_of_torch(ours, theirs, size):
    x = np.random.default_rng(0).random((20, 28, 3)).astype(np.float32)
    y = torch.nn.functional.interpolate(
        torch.from_numpy(x).permute(2, 0, 1)[None], size, mode=theirs, align_corners=False
    )
    wanted = y[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(degradation.resized(x, size, ours), wanted, atol=2e-5)
