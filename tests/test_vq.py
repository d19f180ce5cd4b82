"""The VQ autoencoder: sizes of the published models, quantisation in closed form, gradients, weights and configs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import codec, tree
from ldm_jax.models import vq
from ldm_jax.weights import table
from ldm_jax.weights import vq as their
from tests.drawn import count, drawn, like
from tests.tiny import assert_equal

KEY = jax.random.key(0)
SMALL = dict(width=8, mults=(1, 2), blocks=1, z_channels=3, embed=2, codes=5, groups=4)


def published(widths, latent, codes, attends=False, middle=True):
    """The config that diffusers has of a model of the paper."""
    levels = len(widths)
    side = ["DownEncoderBlock2D"] * (levels - 1) + ["Attn" * attends + "DownEncoderBlock2D"]
    return {
        "_class_name": "VQModel",
        "_diffusers_version": "0.1.2",
        "act_fn": "silu",
        "block_out_channels": list(widths),
        "down_block_types": side,
        "in_channels": 3,
        "latent_channels": latent,
        "layers_per_block": 2,
        "mid_block_add_attention": middle,
        "norm_num_groups": 32,
        "num_vq_embeddings": codes,
        "out_channels": 3,
        "sample_size": 256,
        "up_block_types": [t.replace("DownEncoder", "UpDecoder") for t in reversed(side)],
        "vq_embed_dim": latent,
    }


# config, downsampling factor, the exact number of parameters (CompVis/latent-diffusion)
MODELS = {
    "vq-f4": (published((128, 256, 512), 3, 8192), 4, 55_322_782),
    "vq-f4-noattn": (published((128, 256, 512), 3, 8192, middle=False), 4, 53_219_486),
    "vq-f8": (published((128, 256, 256, 512), 4, 16384, True), 8, 67_717_295),
    "vq-f8-n256": (published((128, 256, 256, 512), 4, 256, True), 8, 67_652_783),
    "vq-f16": (published((128, 128, 256, 256, 512), 8, 16384, True), 16, 69_593_371),
}


def shapes_of(model, channels=3):
    x = jax.ShapeDtypeStruct((1, 32, 32, channels), jnp.float32)
    return jax.eval_shape(model.init, KEY, x)["params"]


@pytest.mark.parametrize("name", MODELS)
def test_published_models_have_their_exact_number_of_parameters(name):
    config, factor, expected = MODELS[name]
    model = their.from_config(config)
    x = jnp.zeros((1, 64, 64, 3))
    (y, codes), variables = jax.eval_shape(model.init_with_output, KEY, x)
    assert count(variables["params"]) == expected
    assert model.factor == factor
    assert codes.indices.shape == (1, 64 // factor, 64 // factor)
    assert y.shape == x.shape
    assert their.from_config(their.to_config(model)) == model
    assert {k: v for k, v in their.to_config(model).items() if k in config and k[0] != "_"} == {
        k: v for k, v in config.items() if k not in ("sample_size",) and k[0] != "_"
    }


def test_the_default_is_the_f4_model():
    assert their.from_config(MODELS["vq-f4"][0]) == vq.VQAutoencoder()


@pytest.mark.parametrize("space", [(12,), (8, 12), (4, 8, 6)])
def test_any_number_of_axes(space):
    model = vq.VQAutoencoder(**SMALL, channels=2, attention=(False, True))
    x = jnp.zeros((2, *space, 2))
    (y, codes), variables = jax.eval_shape(model.init_with_output, KEY, x)
    assert y.shape == x.shape
    assert codes.indices.shape == (2, *(n // 2 for n in space))
    assert codes.indices.dtype == jnp.int32
    assert variables["params"]["codebook"].shape == (5, 2)


def test_the_nearest_entry_is_found_where_products_would_cancel():
    # Neighbours are 0.5 apart at 4096: the squares, 2^24, leave float32 a step of 2 for their sums.
    codebook = 4096.0 + 0.5 * jnp.arange(8.0)[:, None] + jnp.zeros((8, 3))
    wanted = jnp.array([[3, 0, 7], [5, 5, 1]])
    z = codebook[wanted] + jnp.array([0.2, -0.2, 0.1])
    np.testing.assert_array_equal(vq.nearest(z, codebook), wanted)


def test_of_equal_distances_the_first_wins():
    codebook = jnp.array([[2.0], [1.0], [-1.0], [1.0]])
    np.testing.assert_array_equal(vq.nearest(jnp.array([[[0.0], [1.0]]]), codebook), [[1, 1]])


def test_nearest_agrees_with_float64_on_random_data():
    rng = np.random.default_rng(0)
    z, codebook = rng.standard_normal((2, 20, 4)), rng.standard_normal((300, 4))
    exact = np.square(z[..., None, :] - codebook).sum(-1).argmin(-1)
    given = (jnp.asarray(y, jnp.float32) for y in (z, codebook))
    np.testing.assert_array_equal(jax.jit(vq.nearest)(*given), exact)


def quantised(codebook, z):
    variables = {"params": {"codebook": codebook}}
    return vq.VQAutoencoder(**SMALL).apply(variables, z, method="quantize")


def test_quantising_gives_entries_and_passes_gradients_through():
    codebook = jnp.array([[0.0, 0.0], [1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [3.0, 3.0]])
    z = jnp.array([[[0.9, 0.7], [0.1, -0.3], [9.0, 9.0]]])
    entries, indices = quantised(codebook, z)
    np.testing.assert_array_equal(indices, [[1, 0, 4]])
    np.testing.assert_array_equal(entries, codebook[indices])
    again, same = quantised(codebook, entries)
    np.testing.assert_array_equal(again, entries)
    np.testing.assert_array_equal(same, indices)

    weights = jnp.array([[[1.0, 2.0], [-3.0, 0.5], [4.0, 0.0]]])
    of_codebook, of_z = jax.grad(lambda e, z: jnp.sum(weights * quantised(e, z)[0]), (0, 1))(
        codebook, z
    )
    np.testing.assert_array_equal(of_z, weights)
    np.testing.assert_array_equal(of_codebook, np.zeros_like(codebook))


@pytest.mark.parametrize(
    ("legacy", "of_latents", "of_entries"), [(True, 1, 0.25), (False, 0.25, 1)]
)
def test_codebook_loss_in_closed_form(legacy, of_latents, of_entries):
    """`legacy` says which of the two terms beta weighs: the value does not tell, the gradients do."""
    z, e = jnp.array([[[1.0, 2.0], [0.0, 0.0]]]), jnp.array([[[0.0, 2.0], [0.0, 3.0]]])

    def loss(z, e):
        return vq.codebook_loss(z, e, 0.25, legacy)

    value, (of_z, of_e) = jax.value_and_grad(loss, (0, 1))(z, e)
    # mean (e - z)² = (1 + 9) / 4, once and a quarter of it
    np.testing.assert_allclose(value, 1.25 * 10 / 4)
    np.testing.assert_allclose(of_z, of_latents * 2 * (z - e) / 4)
    np.testing.assert_allclose(of_e, of_entries * 2 * (e - z) / 4)


LEVELS = (5, 2, 4)


def test_finite_scalars_are_rounded_bounds_with_the_gradient_of_the_bound():
    """The bound of each channel in float64, from the listing in appendix A.1 of the paper."""
    z = np.random.default_rng(0).normal(0, 2, (2, 2000, 3))
    bounded = np.empty_like(z)
    for i, levels in enumerate(LEVELS):
        half, offset = (levels - 1) * 0.999 / 2, 0.0 if levels % 2 else 0.5
        bounded[..., i] = np.tanh(z[..., i] + np.tan(offset / half)) * half - offset
    width = np.array([2, 1, 2])
    digits = np.round(bounded).astype(int) + width
    weights = jnp.asarray(np.random.default_rng(1).normal(size=z.shape), jnp.float32)

    def entries_of(z):
        entries, indices = vq.finite(z, LEVELS)
        return jnp.sum(weights * entries), (entries, indices)

    given = jnp.asarray(z, jnp.float32)
    of_z, (entries, indices) = jax.grad(entries_of, has_aux=True)(given)
    np.testing.assert_array_equal(entries, ((digits - width) / width).astype(np.float32))
    np.testing.assert_array_equal(indices, digits @ np.array([1, 5, 10]))
    half = (np.array(LEVELS) - 1) * 0.999 / 2
    slope = half * (1 - ((bounded + np.array([0, 0.5, 0.5])) / half) ** 2)
    np.testing.assert_allclose(of_z, weights * slope / width, rtol=1e-3, atol=1e-5)
    assert set(np.unique(indices)) == set(range(40))


def test_an_autoencoder_of_finite_scalars_has_no_codebook_and_its_lookup_inverts_quantising():
    model = vq.VQAutoencoder(**SMALL | dict(embed=3, codes=40, levels=LEVELS))
    shapes = shapes_of(model)
    assert "codebook" not in shapes
    everything = jnp.arange(40)[None]
    entries = model.apply({}, everything, method="lookup")
    assert np.all(np.abs(entries) <= 1)
    assert len(np.unique(np.asarray(entries[0]), axis=0)) == 40
    outside = model.apply({}, jnp.array([[-1, 40]]), method="lookup")
    assert np.all(np.isnan(outside))
    z = jax.random.normal(KEY, (1, 50, 3))
    found, indices = model.apply({}, z, method="quantize")
    np.testing.assert_array_equal(model.apply({}, indices, method="lookup"), found)
    with pytest.raises(ValueError, match=r"the codes of levels=.* need none"):
        their.to_config(model)
    for levels, told in (
        ((5, 4), r"a number of at least 2 for each of embed=3 channels"),
        ((5, 1, 8), r"a number of at least 2"),
        ((5, 2, 3), r"make 30 codes, not codes=40; give that number, or leave levels out"),
    ):
        with pytest.raises(ValueError, match=told):
            vq.VQAutoencoder(**SMALL | dict(embed=3, codes=40, levels=levels))


def test_lookup_inverts_quantising_and_marks_what_is_not_there():
    codebook = jnp.arange(10.0).reshape(5, 2)
    variables = {"params": {"codebook": codebook}}
    read = vq.VQAutoencoder(**SMALL).apply(variables, jnp.array([[4, 0, 5]]), method="lookup")
    np.testing.assert_array_equal(read, [[[8, 9], [0, 1], [np.nan, np.nan]]])


def test_call_is_encode_quantise_decode_and_the_decoder_quantises_itself():
    x = jax.random.normal(KEY, (2, 8, 3))
    model = vq.VQAutoencoder(**SMALL, middle_attention=False)
    variables = drawn(model, x)

    def call(method, *args, **kwargs):
        return jax.jit(lambda v, *args: model.apply(v, *args, method=method, **kwargs))(
            variables, *args
        )

    y, codes = jax.jit(model.apply)(variables, x)
    z = call("encode", x)
    np.testing.assert_array_equal(codes.indices, call("quantize", z)[1])
    np.testing.assert_allclose(codes.latents, z, rtol=1e-5, atol=1e-6)
    entries = call("lookup", codes.indices)
    np.testing.assert_array_equal(codes.entries, entries)
    np.testing.assert_allclose(call("decode", z), y, atol=1e-5)
    as_given = jax.jit(lambda v, z: model.apply(v, z, method="decode", quantized=True))
    np.testing.assert_allclose(as_given(variables, entries), y, atol=1e-5)
    assert np.linalg.norm(as_given(variables, z) - y) > 0.1 * np.linalg.norm(y)


def test_the_loss_reaches_encoder_and_codebook_and_the_reconstruction_only_the_encoder():
    x = jax.random.normal(KEY, (1, 8, 3))
    model = vq.VQAutoencoder(**SMALL | dict(mults=(1,)), middle_attention=False)
    params = drawn(model, x)["params"]

    def losses(params, which):
        y, codes = model.apply({"params": params}, x)
        entries = model.apply({"params": params}, codes.indices, method="lookup")
        return (jnp.mean(jnp.square(y - x)), vq.codebook_loss(codes.latents, entries))[which]

    grad = jax.jit(jax.grad(losses), static_argnums=1)
    for which, reaches in ((0, False), (1, True)):
        of = grad(params, which)
        assert bool(jnp.any(of["codebook"] != 0)) == reaches
        assert jnp.any(of["encoder"]["conv_in"]["kernel"] != 0)
        assert bool(jnp.any(of["decoder"]["conv_in"]["kernel"] != 0)) != reaches


def test_codec_of_a_vq_autoencoder_works_before_quantisation():
    x = jax.random.normal(KEY, (1, 8, 8, 3))
    model = vq.VQAutoencoder(**SMALL, middle_attention=False)
    coder = codec.autoencoder(model)
    arrays = {"params": drawn(model, x)["params"], "scale": jnp.asarray(4.0)}
    assert coder.shape((8, 8, 3)) == (4, 4, 2)
    variables = {"params": arrays["params"]}
    z = jax.jit(coder.encode)(arrays, x, KEY)
    expected = jax.jit(lambda v: model.apply(v, x, method="encode"))(variables)
    np.testing.assert_allclose(z, 4 * expected, rtol=1e-5, atol=1e-6)
    y = jax.jit(model.apply)(variables, x)[0]
    np.testing.assert_allclose(jax.jit(coder.decode)(arrays, z), y, atol=1e-5)


def test_weights_out_and_in_again():
    shapes = shapes_of(vq.VQAutoencoder(**SMALL, attention=(False, True)))
    params = like(shapes)
    tensors = table.export(their.table(), params)
    assert tensors["quantize.embedding.weight"].shape == (5, 2)
    np.testing.assert_array_equal(tensors["quantize.embedding.weight"], params["codebook"])
    assert len(tensors) == len(tree.names(shapes))
    assert_equal(table.load(their.table(tensors), shapes, tensors), params)


def test_bf16_has_float32_parameters_latents_and_output():
    x = jax.random.normal(KEY, (1, 8, 3))
    model = vq.VQAutoencoder(**SMALL, dtype=jnp.bfloat16)
    variables = jax.eval_shape(model.init, KEY, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    y, codes = jax.eval_shape(model.apply, variables, x)
    z = jax.eval_shape(lambda v: model.apply(v, x, method="encode"), variables)
    assert y.dtype == z.dtype == codes.entries.dtype == jnp.float32


def test_scaling_factor():
    assert their.scaling_factor(MODELS["vq-f4"][0]) == 1.0
    assert their.scaling_factor({"scaling_factor": 0.18215}) == 0.18215


def test_errors_say_what_to_do():
    config = MODELS["vq-f4"][0]
    for more, told in (
        ({"norm_type": "spatial"}, r"norm_type = 'spatial' \(we have 'group'\)"),
        ({"lookup_from_codebook": True}, r"lookup_from_codebook = True \(unknown\)"),
    ):
        with pytest.raises(ValueError, match=told):
            their.from_config(config | more)
    their.from_config(config | {"norm_type": "group", "lookup_from_codebook": False})
    with pytest.raises(ValueError, match=r"attention=\(True,\) has 1 values for 2 levels"):
        vq.VQAutoencoder(**SMALL, attention=(True,))
    with pytest.raises(ValueError, match=r"factor, 2, does not divide the spatial shape \(8, 7\)"):
        jax.eval_shape(vq.VQAutoencoder(**SMALL).init, KEY, jnp.zeros((1, 8, 7, 3)))
