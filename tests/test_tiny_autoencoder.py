"""The tiny autoencoder: its size, its ranges in closed form, names and configs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import codec, tree
from ldm_jax.models import tiny_autoencoder
from ldm_jax.weights import table
from ldm_jax.weights import tiny_autoencoder as their
from tests.drawn import count, drawn, like
from tests.tiny import assert_equal

KEY = jax.random.key(0)
SMALL = dict(width=8, encoder_blocks=(1, 2), decoder_blocks=(2, 1), embed=3)
# What the repositories `taesd` and `taesdxl` have; their weights differ.
TAESD = {
    "_class_name": "AutoencoderTiny",
    "_diffusers_version": "0.20.0.dev0",
    "act_fn": "relu",
    "block_out_channels": [64, 64, 64, 64],
    "decoder_block_out_channels": [64, 64, 64, 64],
    "encoder_block_out_channels": [64, 64, 64, 64],
    "force_upcast": False,
    "in_channels": 3,
    "latent_channels": 4,
    "latent_magnitude": 3,
    "latent_shift": 0.5,
    "num_decoder_blocks": [3, 3, 3, 1],
    "num_encoder_blocks": [1, 3, 3, 3],
    "out_channels": 3,
    "scaling_factor": 1.0,
    "upsampling_scaling_factor": 2,
}


def shapes_of(model, size=16):
    x = jax.ShapeDtypeStruct((1, size, size, model.channels), jnp.float32)
    return jax.eval_shape(model.init, KEY, x)["params"]


def test_the_published_model():
    model = their.from_config(TAESD)
    assert model == tiny_autoencoder.TinyAutoencoder()
    assert model.factor == 8
    shapes = shapes_of(model)
    block, stride = 3 * (64 * 64 * 9 + 64), 64 * 64 * 9
    assert (
        count(shapes["encoder"])
        == (3 * 64 * 9 + 64 + 10 * block + 3 * stride + 64 * 4 * 9 + 4)
        == 1_222_532
    )
    assert (
        count(shapes["decoder"])
        == (4 * 64 * 9 + 64 + 10 * block + 3 * stride + 64 * 3 * 9 + 3)
        == 1_222_531
    )
    back = their.to_config(model)
    assert {k: v for k, v in back.items() if k[0] != "_"}.items() <= TAESD.items()
    assert their.from_config(back) == model
    assert their.scaling_factor(TAESD) == their.scaling_factor({}) == 1.0


def test_names_of_layers_that_count_activations_and_enlargements():
    shapes = shapes_of(tiny_autoencoder.TinyAutoencoder())
    rows = their.table((1, 3, 3, 3), (3, 3, 3, 1))
    found = {name: table.their_name(rows, name) for name in tree.names(shapes)}
    assert len(set(found.values()) - {None}) == len(found)
    for ours, theirs in {
        "encoder/conv_in/kernel": "encoder.layers.0.weight",
        "encoder/level_0_block_0/conv_2/bias": "encoder.layers.1.conv.4.bias",
        "encoder/down_1/kernel": "encoder.layers.2.weight",
        "encoder/level_1_block_0/conv_1/kernel": "encoder.layers.3.conv.2.weight",
        "encoder/conv_out/bias": "encoder.layers.14.bias",
        "decoder/conv_in/bias": "decoder.layers.0.bias",
        "decoder/level_0_block_0/conv_0/kernel": "decoder.layers.2.conv.0.weight",
        "decoder/up_1/kernel": "decoder.layers.6.weight",
        "decoder/level_3_block_0/conv_0/bias": "decoder.layers.17.conv.0.bias",
        "decoder/conv_out/kernel": "decoder.layers.18.weight",
    }.items():
        assert found[ours] == theirs


def test_weights_out_and_in_again():
    shapes = shapes_of(tiny_autoencoder.TinyAutoencoder(**SMALL))
    params = like(shapes)
    rows = their.table(SMALL["encoder_blocks"], SMALL["decoder_blocks"])
    tensors = table.export(rows, params)
    assert len(tensors) == len(tree.names(shapes))
    assert_equal(table.load(rows, shapes, tensors), params)


@pytest.mark.parametrize("space", [(12,), (8, 12), (4, 8, 6)])
def test_any_number_of_axes(space):
    model = tiny_autoencoder.TinyAutoencoder(**SMALL, channels=2)
    x = jnp.zeros((2, *space, 2))
    y, variables = jax.eval_shape(model.init_with_output, KEY, x)
    z = jax.eval_shape(lambda v: model.apply(v, x, method="encode"), variables)
    assert y.shape == x.shape
    assert z.shape == (2, *(n // 2 for n in space), 3)


def test_scaling_to_the_unit_interval_and_back():
    z = jnp.array([-4.0, -3.0, 0.0, 1.5, 3.0, 7.0])
    y = tiny_autoencoder.scale_latents(z)
    np.testing.assert_allclose(y, [0.0, 0.0, 0.5, 0.75, 1.0, 1.0])
    np.testing.assert_allclose(
        tiny_autoencoder.unscale_latents(y), [-3.0, -3.0, 0.0, 1.5, 3.0, 3.0]
    )
    np.testing.assert_allclose(tiny_autoencoder.scale_latents(z, 2.0, 0.25)[2:4], [0.25, 0.625])


def test_ranges_of_data_and_latents():
    model = tiny_autoencoder.TinyAutoencoder(**SMALL)
    x = jax.random.uniform(KEY, (1, 4, 3), minval=-1.0)
    variables = drawn(model, x)
    decode = jax.jit(lambda v, z: model.apply(v, z, method="decode"))
    z = jax.random.normal(KEY, (1, 2, 3))
    # Far latents are all one: tanh squashes them.
    np.testing.assert_allclose(decode(variables, z * 1e3), decode(variables, z * 1e4), rtol=1e-5)
    assert not np.allclose(decode(variables, z), decode(variables, 2 * z))
    # A last layer that gives v in [0, 1] is read as 2 v - 1, beyond [-1, 1] too.
    last = variables["params"]["decoder"]["conv_out"]
    for v, expected in ((0.0, -1.0), (0.5, 0.0), (1.0, 1.0), (2.0, 3.0)):
        last.update(kernel=jnp.zeros_like(last["kernel"]), bias=jnp.full(3, v))
        np.testing.assert_allclose(decode(variables, z), np.full((1, 4, 3), expected))
    # Black data enters as zero: without biases nothing comes out.
    encoder = jax.tree.map(lambda a: a if a.ndim > 1 else 0 * a, variables["params"]["encoder"])
    blind = {"params": variables["params"] | {"encoder": encoder}}
    encode = jax.jit(lambda v, x: model.apply(v, x, method="encode"))
    np.testing.assert_array_equal(encode(blind, -jnp.ones_like(x)), np.zeros((1, 2, 3)))
    assert np.any(encode(blind, x) != 0)


def test_codec_of_a_tiny_autoencoder():
    model = tiny_autoencoder.TinyAutoencoder(**SMALL)
    x = jax.random.normal(KEY, (1, 8, 3))
    coder = codec.autoencoder(model)
    variables = drawn(model, x)
    arrays = {"params": variables["params"], "scale": jnp.ones(())}
    assert coder.shape((8, 3)) == (4, 3)

    @jax.jit
    def both(arrays, variables):
        z = coder.encode(arrays, x, KEY)
        return coder.decode(arrays, z), model.apply(variables, x)

    np.testing.assert_allclose(*both(arrays, variables), atol=1e-6)


def test_half_precision_has_float32_parameters_and_output():
    model = their.from_config(TAESD, jnp.float16)
    x = jnp.zeros((1, 16, 16, 3))
    y, variables = jax.eval_shape(model.init_with_output, KEY, x)
    z = jax.eval_shape(lambda v: model.apply(v, x, method="encode"), variables)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert (model.dtype, y.dtype, z.dtype) == (jnp.float16, jnp.float32, jnp.float32)


def test_errors_say_what_to_do():
    for more, told in (
        (dict(act_fn="silu"), r"act_fn = 'silu' \(we have 'relu'\)"),
        (dict(upsample_fn="bilinear"), "upsample_fn = 'bilinear'"),
        (dict(latent_magnitude=4), "latent_magnitude = 4"),
        (dict(shift_factor=0.1), "shift_factor = 0.1"),
        (dict(unheard_of=True), r"unheard_of = True \(unknown\)"),
        (dict(decoder_block_out_channels=[64, 64, 64, 32]), "other than one width throughout"),
        (dict(encoder_block_out_channels=[64, 64, 64]), "one number of blocks a level"),
        (dict(out_channels=4), "as many channels out as in"),
    ):
        with pytest.raises(ValueError, match=told):
            their.from_config(TAESD | more)
    with pytest.raises(ValueError, match="not equally many levels"):
        tiny_autoencoder.TinyAutoencoder(encoder_blocks=(1, 1), decoder_blocks=(1,))
    model = tiny_autoencoder.TinyAutoencoder()
    with pytest.raises(ValueError, match=r"factor, 8, does not divide the spatial shape \(12, 8\)"):
        jax.eval_shape(model.init, KEY, jnp.zeros((1, 12, 8, 3)))
    with pytest.raises(ValueError, match="channels=3"):
        jax.eval_shape(model.init, KEY, jnp.zeros((1, 8, 8, 4)))
