"""The autoencoder against diffusers' `AutoencoderKL` with the same random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models import autoencoder
from ldm_jax.weights import autoencoder as their
from tests.parity import weights

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.parity


@pytest.mark.parametrize("attends", [False, True])
def test_latents_and_reconstruction_equal_those_of_diffusers(attends):
    kinds = ["DownEncoderBlock2D", "AttnDownEncoderBlock2D" if attends else "DownEncoderBlock2D"]
    theirs = weights.randomised(
        diffusers.AutoencoderKL(
            in_channels=3,
            out_channels=3,
            block_out_channels=(16, 32),
            layers_per_block=2,
            latent_channels=4,
            norm_num_groups=8,
            down_block_types=kinds,
            up_block_types=[
                kind.replace("Down", "Up").replace("Encoder", "Decoder") for kind in kinds[::-1]
            ],
        )
    )
    ours = autoencoder.KLAutoencoder(width=16, mults=(1, 2), groups=8, attention=(False, attends))
    x = np.random.default_rng(0).standard_normal((2, 8, 12, 3)).astype(np.float32)
    key = jax.random.key(0)
    shapes = jax.eval_shape(ours.init, key, jnp.asarray(x), key)["params"]
    params = {"params": weights.copied(theirs, shapes, their.table())}

    @jax.jit
    def run(params, x):
        posterior = ours.apply(params, x, method="encode")
        return posterior, ours.apply(params, posterior.mean, method="decode"), posterior.kl()

    posterior, y, kl = run(params, x)
    with torch.no_grad():
        reference = theirs.encode(torch.from_numpy(x).permute(0, 3, 1, 2)).latent_dist
        decoded = theirs.decode(reference.mean).sample
    assert weights.relative_error(posterior.mean, reference.mean) < 1e-4
    assert weights.relative_error(posterior.logvar, reference.logvar) < 1e-4
    assert weights.relative_error(y, decoded) < 1e-4
    np.testing.assert_allclose(kl, reference.kl().numpy(), rtol=1e-4)
