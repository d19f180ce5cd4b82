"""Folders that diffusers writes are read, and what we write diffusers reads: the same tensors to the byte."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models import autoencoder, unet
from ldm_jax.types import Cond
from ldm_jax.weights import autoencoder as their_autoencoder
from ldm_jax.weights import files, table
from ldm_jax.weights import unet as their_unet
from tests.parity import weights

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.parity

X = jax.ShapeDtypeStruct((1, 16, 16, 4), jnp.float32)
KEY = jax.random.key(0)


def unets():
    theirs = diffusers.UNet2DConditionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
        cross_attention_dim=10,
        norm_num_groups=8,
    )
    ours = unet.UNet(width=16, mults=(1, 2), blocks=1, attention=(1, 0), heads=2, groups=8)
    cond = Cond(tokens=jnp.zeros((1, 5, 10)))
    shapes = jax.eval_shape(ours.init, KEY, X, jnp.zeros(1), cond)["params"]
    return theirs, shapes, their_unet.table()


def autoencoders():
    theirs = diffusers.AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
    )
    ours = autoencoder.KLAutoencoder(width=16, mults=(1, 2), blocks=1, groups=8)
    x = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    return theirs, jax.eval_shape(ours.init, KEY, x, KEY)["params"], their_autoencoder.table()


@pytest.mark.parametrize("family", [unets, autoencoders])
@pytest.mark.parametrize("parts", [1, 3])
def test_from_diffusers_and_back(family, parts, tmp_path):
    theirs, shapes, rows = family()
    weights.randomised(theirs)
    size = sum(p.numel() * 4 for p in theirs.parameters())
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=size if parts == 1 else size // 2)
    name = "diffusion_pytorch_model.safetensors" + (".index.json" if parts > 1 else "")
    params = table.load(rows, shapes, files.read(tmp_path / "theirs" / name))

    tensors = table.export(rows, params)
    for key, value in theirs.state_dict().items():
        np.testing.assert_array_equal(tensors.pop(key), value.numpy())
    assert not tensors

    ours = tmp_path / "ours"
    files.write(ours / "diffusion_pytorch_model.safetensors", table.export(rows, params))
    theirs.save_config(ours)
    again = type(theirs).from_pretrained(ours)
    for key, value in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
