"""U-Nets of published configs: sizes, spellings, the class table, round trips, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import tree
from ldm_jax.models import unet
from ldm_jax.nn import attention
from ldm_jax.types import Cond
from ldm_jax.weights import table
from ldm_jax.weights import unet as their
from tests.drawn import count, drawn
from tests.published_unets import CELEBA, REFINER, SD1, SD2, SDXL, UNCLIP, UNETS, UPSCALER

# Of those that differ in a width alone, one.
NAMES = [
    name
    for name in UNETS
    if name
    not in ("Stable Diffusion 2.1 v", "inpainting 2", "image variation", "unCLIP small", "depth")
]


def shapes_of(config, network=None):
    network = network or their.from_config(config)
    return jax.eval_shape(network.init, jax.random.key(0), *their.example(config))["params"]


@pytest.mark.parametrize("name", NAMES)
def test_published_configs_and_back(name):
    config, number, spatial = UNETS[name]
    network = their.from_config(config, dtype=jnp.bfloat16)
    assert network.dtype == jnp.bfloat16
    shapes = shapes_of(config, network)
    assert count(shapes) == number
    assert their.channels(config) == (
        config["in_channels"] - spatial,
        spatial,
        config["out_channels"],
    )
    names = [table.their_name(their.table_of(config), at) for at in tree.names(shapes)]
    assert None not in names
    assert len(set(names)) == len(names)
    back = their.to_config(network, shapes, their.embedding_of(config))
    assert their.from_config(back, dtype=jnp.bfloat16) == network
    for key in ("_class_name", "in_channels", "out_channels", "cross_attention_dim"):
        assert back.get(key) == config.get(key)


def test_settings_that_configs_spell_in_two_ways():
    network = their.from_config(SD1)
    assert (network.width, network.mults, network.attention) == (320, (1, 2, 4, 4), (1, 1, 1, 0))
    assert (network.heads, network.middle, network.projection) == (8, 1, "conv")
    for same in (
        dict(layers_per_block=[2] * 4, cross_attention_dim=[768] * 4, act_fn="swish"),
        dict(transformer_layers_per_block=[1] * 4, attention_head_dim=99, num_attention_heads=8),
        dict(only_cross_attention=[False] * 4, upcast_attention=True),
    ):
        assert their.from_config(SD1 | same) == network
    lists = their.from_config(SD1 | dict(cross_attention_dim=[768] * 4))
    assert shapes_of(SD1 | dict(cross_attention_dim=[768] * 4), lists) == shapes_of(SD1)
    assert their.from_config(SD2).heads == (5, 10, 20, 20)
    assert their.from_config(SDXL).attention == (0, 2, 10)
    assert their.from_config(REFINER).middle == 4
    assert their.from_config(UPSCALER).only_cross == (False, True, True, False)
    assert (their.from_config(UPSCALER).vector, their.from_config(UNCLIP).vector) == (1000, 2048)


def test_names_of_what_reads_the_vector():
    def name(config, leaf):
        return table.their_name(their.table_of(config), leaf)

    assert name(SDXL, "vector/out/bias") == "add_embedding.linear_2.bias"
    assert name(UNCLIP, "vector/in/kernel") == "class_embedding.linear_1.weight"
    assert name(UPSCALER, "vector/embedding") == "class_embedding.weight"


def test_a_network_that_is_written_is_one_that_is_read():
    """Settings that no published config has: heads by their width, depths of its own, a deeper middle."""
    network = unet.UNet(
        width=16,
        mults=(1, 2, 4),
        blocks=1,
        attention=(0, 2, 0),
        middle=3,
        head_dim=16,
        groups=4,
        scale_shift=True,
        dropout=0.1,
        eps=1e-6,
    )
    example = their.example_of(network, their.Channels(3, 2, 3), 6)
    shapes = jax.eval_shape(network.init, jax.random.key(0), *example)["params"]
    config = their.to_config(network, shapes)
    assert config["in_channels"] == 5
    again = their.from_config(config)
    assert again == network.clone(head_dim=None, heads=(1, 2, 4), out_channels=3)
    assert shapes_of(config) == shapes


SMALL = dict(width=8, mults=(1, 2), blocks=1, groups=4, heads=2, out_channels=3)


def test_a_class_picks_its_row():
    network = unet.UNet(**SMALL | dict(mults=(1,), middle=0), vector=5, vector_from="table")
    x, t = jnp.ones((2, 4, 4, 3)), jnp.array([3.0, 9.0])
    labels = jax.nn.one_hot(jnp.array([4, 1]), 5)
    params = drawn(network, x, t, Cond(vector=labels))["params"]
    rows = params["vector"]["embedding"]
    assert rows.shape == (5, 32)
    apply = jax.jit(lambda params, vector: network.apply({"params": params}, x, t, Cond(vector)))
    y = apply(params, labels)
    # The rows as biases of the time embedding, one sample at a time, give the same; zeros give none.
    bare = jax.jit(lambda params: network.clone(vector=0).apply({"params": params}, x, t))
    rest = {k: v for k, v in params.items() if k != "vector"}
    for i, row in ((0, rows[4]), (1, rows[1])):
        out = rest["time"]["out"]
        moved = rest | {"time": rest["time"] | {"out": out | {"bias": out["bias"] + row}}}
        np.testing.assert_allclose(y[i], bare(moved)[i], atol=1e-4)
    nothing = apply(params, jnp.zeros((2, 5)))
    np.testing.assert_allclose(nothing, bare(rest), atol=1e-4)


def test_with_only_cross_positions_do_not_see_each_other_in_the_transformer():
    x, tokens = jax.random.normal(jax.random.key(0), (1, 6, 8)), jnp.ones((1, 3, 5))
    for only_cross in (True, False):
        block = attention.TransformerBlock(2, 4, only_cross=only_cross)
        variables = drawn(block, x, tokens)
        width = variables["params"]["self_attn"]["k"]["kernel"].shape[0]
        assert width == (5 if only_cross else 8)
        apply = jax.jit(lambda *inputs, b=block, v=variables: b.apply(v, *inputs))
        y = apply(x, tokens)
        moved = apply(x.at[0, 0, 0].add(1.0), tokens)
        seen = bool(np.abs(moved - y)[0, 1:].max() > 1e-4)
        assert seen != only_cross
        # Tokens behind the mask are hidden from both attentions.
        mask = jnp.array([[True, True, False]])
        y, hidden = (apply(x, tokens.at[0, 2].set(v), mask) for v in (0.0, 9.0))
        np.testing.assert_allclose(y, hidden, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (SD1, dict(_class_name="UNet3DConditionModel"), "that of a UNet3DConditionModel"),
        (SD1, dict(act_fn="gelu"), "act_fn = 'gelu'"),
        (SD1, dict(freq_shift=1), "freq_shift = 1"),
        (SD1, dict(flip_sin_to_cos=False), "flip_sin_to_cos = False"),
        (SD1, dict(time_embedding_type="fourier"), "time_embedding_type = 'fourier'"),
        (SD1, dict(center_input_sample=True), "center_input_sample = True"),
        (SD1, dict(class_embed_type="timestep"), "class_embed_type = 'timestep'"),
        (SD1, dict(class_embed_type="projection"), "needs a projection_class"),
        (SD1, dict(time_cond_proj_dim=256), "time_cond_proj_dim = 256"),
        (SD1, dict(encoder_hid_dim_type="ip_image_proj"), "encoder_hid_dim_type"),
        (SD1, dict(mid_block_type="UNetMidBlock2D"), "mid_block_type = 'UNetMidBlock2D'"),
        (SD1, dict(layers_per_block=[1, 2, 2, 2]), r"layers_per_block=\(1, 2, 2, 2\)"),
        (SD1, dict(cross_attention_dim=[1, 2, 2, 2]), "cross_attention_dim"),
        (SD1, dict(transformer_layers_per_block=[0, 1, 1, 1]), "one positive number a level"),
        (SD1, dict(transformer_layers_per_block=[[1], 1, 1, 1]), "one positive number a level"),
        (SD1, dict(block_out_channels=[320, 500, 1280, 1280]), "multiples of the first"),
        (SD1, dict(down_block_types=["KDownBlock2D"] * 4), r"\['KDownBlock2D'\]"),
        (SD1, dict(up_block_types=["UpBlock2D"] * 4), "not the mirror image"),
        (SDXL, dict(num_class_embeds=10), "several vectors"),
        (SDXL, dict(addition_time_embed_dim=128), "addition_time_embed_dim = 128"),
        (CELEBA, dict(attn_norm_num_groups=16), "another norm in the middle"),
        (CELEBA, dict(resnet_time_scale_shift="scale_shift"), "another norm in the middle"),
        (CELEBA, dict(downsample_type="resnet"), "in two ways"),
        (CELEBA, dict(downsample_type="resnet", upsample_type="resnet"), "in two ways"),
    ],
)
def test_what_we_lack_is_told(config, change, message):
    with pytest.raises(ValueError, match=message):
        their.from_config(config | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(coordinates=True), "coordinates=True"),
        (dict(stride=(1, 2)), r"stride=\(1, 2\)"),
        (dict(attention=(0, 2)), "middle=1 must be positive and the depth of the last level"),
        (dict(attention=(1, 0), middle=0), "middle=0 must be positive"),
        (dict(attention=(1, 1), transformer=False), r"heads of one width, .* \[4, 8\]"),
        (dict(transformer=False, vector=3), "no vector but a class"),
        (dict(transformer=False, resample_blocks=True), "attend at all levels"),
    ],
)
def test_what_diffusers_lacks_is_told(change, message):
    network = unet.UNet(**SMALL | change)
    example = their.example_of(network, their.Channels(3, 0, 3), 6)
    shapes = jax.eval_shape(network.init, jax.random.key(0), *example)["params"]
    with pytest.raises(ValueError, match=message):
        their.to_config(network, shapes)


def test_bad_settings_of_the_network_are_told():
    with pytest.raises(ValueError, match=r"only_cross=\(True,\) has 1 values for 2 levels"):
        unet.UNet(**SMALL, only_cross=(True,))
    with pytest.raises(ValueError, match="only_cross needs attention to tokens"):
        unet.UNet(**SMALL, only_cross=(True, False), transformer=False)
    network = unet.UNet(**SMALL, attention=(1, 0), only_cross=(True, False))
    with pytest.raises(ValueError, match="nothing but tokens at some levels"):
        jax.eval_shape(network.init, jax.random.key(0), jnp.ones((1, 4, 4, 3)), jnp.ones(1))
