"""The U-Net against diffusers' `UNet2DConditionModel` and `UNet2DModel` with the same random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models import unet
from ldm_jax.types import Cond
from ldm_jax.weights import unet as their
from tests.parity import weights

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.parity

T = np.array([0.25, 731.0], np.float32)


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def channels_first(x):
    return torch.from_numpy(x).permute(0, 3, 1, 2)


def ours_on(network, theirs, rules, x, cond):
    shapes = jax.eval_shape(network.init, jax.random.key(0), x, jnp.asarray(T), cond)["params"]
    params = weights.copied(theirs, shapes, rules)
    return jax.jit(network.apply)({"params": params}, x, T, cond)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("projection", ["conv", "linear"])
def test_cross_attention_vector_and_spatial_condition(projection, masked):
    theirs = weights.randomised(
        diffusers.UNet2DConditionModel(
            in_channels=6,
            out_channels=4,
            block_out_channels=(16, 32, 48),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 1, 2),
            attention_head_dim=(2, 2, 4),  # despite its name, the number of heads
            cross_attention_dim=10,
            norm_num_groups=8,
            use_linear_projection=projection == "linear",
            class_embed_type="projection",
            projection_class_embeddings_input_dim=5,
        )
    )
    network = unet.UNet(
        width=16,
        mults=(1, 2, 3),
        attention=(0, 1, 2),
        middle=2,
        heads=(2, 2, 4),
        projection=projection,
        groups=8,
        vector=5,
    )
    x, spatial, tokens, vector = (
        random(2, 8, 12, 4),
        random(2, 8, 12, 2, seed=1),
        random(2, 7, 10, seed=2),
        random(2, 5),
    )
    mask = np.arange(7)[None] < np.array([[3], [7]]) if masked else None
    cond = Cond(*(None if y is None else jnp.asarray(y) for y in (vector, tokens, mask, spatial)))
    y = ours_on(network, theirs, their.table(), x, cond)
    with torch.no_grad():
        reference = theirs(
            channels_first(np.concatenate([x, spatial], axis=-1)),
            torch.from_numpy(T),
            encoder_hidden_states=torch.from_numpy(tokens),
            encoder_attention_mask=None if mask is None else torch.from_numpy(mask),
            class_labels=torch.from_numpy(vector),
        ).sample
    assert weights.relative_error(y, reference) < 1e-4


@pytest.mark.parametrize("inside", [False, True])
def test_plain_attention_with_scale_shift_and_resampling_inside_blocks(inside):
    kind = "resnet" if inside else "conv"
    theirs = weights.randomised(
        diffusers.UNet2DModel(
            in_channels=3,
            out_channels=3,
            block_out_channels=(16, 32),
            layers_per_block=2,
            down_block_types=("AttnDownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "AttnUpBlock2D"),
            attention_head_dim=8,
            norm_num_groups=8,
            attn_norm_num_groups=8,
            resnet_time_scale_shift="scale_shift" if inside else "default",
            downsample_type=kind,
            upsample_type=kind,
        )
    )
    network = unet.UNet(
        width=16,
        mults=(1, 2),
        attention=(1, 1),
        head_dim=8,
        transformer=False,
        scale_shift=inside,
        resample_blocks=inside,
        groups=8,
    )
    x = random(2, 8, 12, 3)
    y = ours_on(network, theirs, their.table(transformer=False), x, Cond())
    with torch.no_grad():
        reference = theirs(channels_first(x), torch.from_numpy(T)).sample
    assert weights.relative_error(y, reference) < 1e-4
