"""Configs and names of the KL autoencoders that were published, and what float16 does to the one of XL."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import tree
from ldm_jax.models import autoencoder
from ldm_jax.weights import autoencoder as their
from ldm_jax.weights import table
from tests.drawn import count, drawn, like
from tests.tiny import assert_equal

KEY = jax.random.key(0)


def published(widths=(128, 256, 512, 512), latent=4, attends=0, size=512, **more):
    """The config that diffusers has of a published model; attention at the last `attends` levels."""
    plain = len(widths) - attends
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.6.0",
        "act_fn": "silu",
        "block_out_channels": list(widths),
        "down_block_types": ["DownEncoderBlock2D"] * plain + ["AttnDownEncoderBlock2D"] * attends,
        "in_channels": 3,
        "latent_channels": latent,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": size,
        "up_block_types": ["AttnUpDecoderBlock2D"] * attends + ["UpDecoderBlock2D"] * plain,
        **more,
    }


XL = dict(size=1024, scaling_factor=0.13025, force_upcast=True, latents_mean=None, latents_std=None)
# config, the network, its number of parameters, the scale of its latents
MODELS = {
    "Stable Diffusion 1": (published(), {}, 83_653_863, 0.18215),
    "Stable Diffusion 2.1": (published(size=768, scaling_factor=0.18215), {}, 83_653_863, 0.18215),
    "Stable Diffusion XL": (published(**XL, shift_factor=None), {}, 83_653_863, 0.13025),
    "x4 upscaler": (
        published((128, 256, 512), size=256, scaling_factor=0.08333),
        dict(mults=(1, 2, 4)),
        # kl-f4 and one more channel in z: conv_out, conv_in and the two matrices
        55_312_063 + (2 * 512 * 9 + 2) + 512 * 9 + (72 - 42) + (20 - 12),
        0.08333,
    ),
    "kl-f4": (
        published((128, 256, 512), 3, scaling_factor=1.0),
        dict(mults=(1, 2, 4), z_channels=3, embed=3),
        55_312_063,
        1.0,
    ),
    "kl-f16": (
        published((128, 128, 256, 256, 512), 16, 1, 256),
        dict(mults=(1, 1, 2, 2, 4), z_channels=16, embed=16, attention=(False,) * 4 + (True,)),
        69_610_963,
        0.18215,
    ),
    "kl-f32": (
        published((128, 128, 256, 256, 512, 512), 64, 2, 256),
        dict(
            mults=(1, 1, 2, 2, 4, 4), z_channels=64, embed=64, attention=(False,) * 4 + (True,) * 2
        ),
        103_880_131,
        0.18215,
    ),
}
SMALL = dict(width=8, mults=(1, 2), blocks=1, groups=4)


def shapes_of(model, size=32):
    x = jax.ShapeDtypeStruct((1, size, size, model.channels), jnp.float32)
    return jax.eval_shape(model.init, KEY, x, KEY)["params"]


@pytest.mark.parametrize("name", MODELS)
def test_published_configs(name):
    config, settings, parameters, scale = MODELS[name]
    model = their.from_config(config)
    assert model == autoencoder.KLAutoencoder(**settings)
    assert count(shapes_of(model)) == parameters
    assert their.scaling_factor(config) == scale
    back = their.to_config(model, scale, config.get("force_upcast", True))
    assert their.from_config(back) == model
    told = {k: v for k, v in config.items() if k[0] != "_" and k != "sample_size" and v is not None}
    assert {k: back[k] for k in told} == told
    assert back["_class_name"] == "AutoencoderKL"


def test_defaults_are_those_of_diffusers():
    model = their.from_config({})
    assert (model.width, tuple(model.mults), model.blocks) == (64, (1,), 1)
    assert (model.z_channels, model.embed, model.groups) == (4, 4, 32)


def test_widths_need_not_be_multiples_of_the_first():
    model = their.from_config(published((96, 160, 64)))
    assert [model.width * m for m in model.mults] == [96, 160, 64]
    assert their.to_config(model)["block_out_channels"] == [96, 160, 64]


@pytest.mark.parametrize("quant", [True, False])
@pytest.mark.parametrize("post", [True, False])
def test_parts_that_a_config_may_leave_out(quant, post):
    config = published(
        (64, 64),
        use_quant_conv=quant,
        use_post_quant_conv=post,
        mid_block_add_attention=False,
    )
    model = their.from_config(config)
    names = [table.their_name(their.table(), name) for name in tree.names(shapes_of(model))]
    assert ("quant_conv.weight" in names) == quant
    assert ("post_quant_conv.weight" in names) == post
    assert not [name for name in names if "attentions" in name]
    back = their.to_config(model)
    assert {k: back[k] for k in config if k in back and k[0] != "_"}.items() >= {
        "use_quant_conv": quant,
        "use_post_quant_conv": post,
        "mid_block_add_attention": False,
    }.items()
    assert their.from_config(back) == model


EARLIER = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("ones", [0, 2])
def test_files_with_earlier_names_and_with_matrices_as_convolutions(earlier, ones):
    shapes = shapes_of(autoencoder.KLAutoencoder(**SMALL, attention=(False, True)))
    params = like(shapes)
    tensors = {}
    for name, tensor in table.export(their.table(), params).items():
        if "attentions" in name and name.endswith("weight") and tensor.ndim == 2:
            tensor = tensor.reshape(*tensor.shape, *(1,) * ones)
        if earlier:
            for now, before in EARLIER.items():
                name = name.replace(f".{now}.", f".{before}.")
        tensors[name] = tensor
    # One level's blocks and the middle: 1 + 1 in the encoder, 2 + 1 in the decoder.
    assert sum(name.endswith(("query.weight", "to_q.weight")) for name in tensors) == 5
    rows = their.table(tensors)
    assert_equal(table.load(rows, shapes, tensors), params)
    again = table.export(rows, params)
    assert again.keys() == tensors.keys()
    assert all(again[k].shape == tensors[k].shape for k in tensors)
    if earlier or ones:
        with pytest.raises(table.Mismatch):
            table.load(their.table(), shapes, tensors)


def test_what_we_lack_is_told():
    for more, told in (
        (dict(latents_mean=[0.1] * 4), r"latents_mean = \(0.1, 0.1, 0.1, 0.1\) \(unknown\)"),
        (dict(latents_std=[0.1] * 4), "latents_std"),
        (dict(shift_factor=0.0609), "shift_factor = 0.0609"),
        (dict(act_fn="gelu"), "act_fn = 'gelu'"),
        (dict(out_channels=4), "in_channels=3 and out_channels=4"),
        (dict(down_block_types=["DownBlock2D"] * 4), "a block 'DownBlock2D'"),
        (dict(up_block_types=["UpDecoderBlock2D"] * 3), "decoders that mirror their encoders"),
        (
            dict(up_block_types=["UpDecoderBlock2D"] * 3 + ["AttnUpDecoderBlock2D"]),
            "decoders that mirror their encoders",
        ),
    ):
        with pytest.raises(ValueError, match=told):
            their.from_config(published() | more)
    with pytest.raises(ValueError, match="embed=2 and z_channels=4 differ"):
        their.to_config(autoencoder.KLAutoencoder(embed=2))
    with pytest.raises(ValueError, match="stride=3"):
        their.to_config(autoencoder.KLAutoencoder(stride=3))
    with pytest.raises(ValueError, match="embed=2 and z_channels=4 differ"):
        autoencoder.KLAutoencoder(embed=2, use_post_quant_conv=False)


@pytest.mark.parametrize(
    ("given", "asked", "computes"),
    [
        (dict(force_upcast=True), jnp.float16, jnp.float32),
        (dict(force_upcast=True), jnp.bfloat16, jnp.bfloat16),
        (dict(force_upcast=True), jnp.float32, jnp.float32),
        (dict(force_upcast=False), jnp.float16, jnp.float16),
        (dict(), jnp.float16, jnp.float16),
    ],
)
def test_compute_dtype(given, asked, computes):
    assert their.compute_dtype(given, asked) == computes
    assert their.from_config(published(**given), asked).dtype == computes


def test_float16_overflows_and_the_upcast_network_does_not():
    config = published((8, 16), norm_num_groups=4) | dict(layers_per_block=1)
    careless = their.from_config(config | dict(force_upcast=False), jnp.float16)
    upcast = their.from_config(config | dict(force_upcast=True), jnp.float16)
    z = jax.random.normal(KEY, (1, 4, 4, 4))
    params = like(shapes_of(careless, 16))
    # The weights stay below 65504, float16's largest number; what they give does not, and no norm can undo that.
    first = params["decoder"]["conv_in"]
    params["decoder"]["conv_in"] = {"kernel": first["kernel"] * 5e4, "bias": first["bias"]}
    assert jnp.isfinite(params["decoder"]["conv_in"]["kernel"].astype(jnp.float16)).all()

    def decode(model):
        return jax.jit(lambda p, z: model.apply({"params": p}, z, method="decode"))(params, z)

    assert not np.isfinite(decode(careless)).all()
    y = decode(upcast)
    assert np.isfinite(y).all()
    exact = their.from_config(config, jnp.float32)
    np.testing.assert_array_equal(y, decode(exact))


def test_latents_are_a_sample_of_the_posterior():
    model = autoencoder.KLAutoencoder(**SMALL)
    x = jax.random.normal(KEY, (1, 8, 3))
    variables = drawn(model, x, KEY)

    @jax.jit
    def both(variables):
        z = model.apply(variables, x, KEY, method="latents")
        return z, model.apply(variables, x, method="encode").sample(KEY)

    np.testing.assert_array_equal(*both(variables))
