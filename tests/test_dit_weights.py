"""DiT under published names: every tensor, both kinds of files and back, what is kept beside the parameters, errors."""

import json

import jax
import numpy as np
import pytest

from ldm_jax.models import dit
from ldm_jax.weights import dit as their
from ldm_jax.weights import table
from tests.drawn import like
from tests.tiny import assert_equal

NETWORK = dit.DiT(width=12, depth=2, heads=3, variance=True)
CLASSES, CHANNELS, SIDE = 5, 4, 3
# The names and shapes of the tensors that facebookresearch/DiT writes for this model.
BLOCK = {
    "attn.qkv.weight": (36, 12),
    "attn.qkv.bias": (36,),
    "attn.proj.weight": (12, 12),
    "attn.proj.bias": (12,),
    "mlp.fc1.weight": (48, 12),
    "mlp.fc1.bias": (48,),
    "mlp.fc2.weight": (12, 48),
    "mlp.fc2.bias": (12,),
    "adaLN_modulation.1.weight": (72, 12),
    "adaLN_modulation.1.bias": (72,),
}
ORIGINAL = {
    "pos_embed": (1, 9, 12),
    "x_embedder.proj.weight": (12, 4, 2, 2),
    "x_embedder.proj.bias": (12,),
    "t_embedder.mlp.0.weight": (12, 256),
    "t_embedder.mlp.0.bias": (12,),
    "t_embedder.mlp.2.weight": (12, 12),
    "t_embedder.mlp.2.bias": (12,),
    "y_embedder.embedding_table.weight": (6, 12),
    **{f"blocks.{i}.{name}": shape for i in range(2) for name, shape in BLOCK.items()},
    "final_layer.adaLN_modulation.1.weight": (24, 12),
    "final_layer.adaLN_modulation.1.bias": (24,),
    "final_layer.linear.weight": (32, 12),
    "final_layer.linear.bias": (32,),
}
PARAMS = like(their.shapes(NETWORK, CLASSES, CHANNELS))


def original():
    return their.with_positions(table.export(their.ORIGINAL, PARAMS), SIDE)


def of_diffusers():
    return their.spread(table.export(their.DIFFUSERS, PARAMS), NETWORK.depth)


def shapes():
    return jax.eval_shape(lambda: PARAMS)


def test_the_authors_files_and_back():
    tensors = original()
    assert {k: v.shape for k, v in tensors.items()} == ORIGINAL
    assert_equal(table.load(their.ORIGINAL, shapes(), their.original(tensors)), PARAMS)
    # q, k and v lie one after the other, and a patch row by row.
    qkv = tensors["blocks.1.attn.qkv.weight"]
    k = np.asarray(PARAMS["network"]["block_1"]["attn"]["k"]["kernel"])
    np.testing.assert_array_equal(qkv[12:24], k.T)
    kernel = np.asarray(PARAMS["network"]["patches"]["kernel"])
    assert tensors["x_embedder.proj.weight"][7, 3, 0, 1] == kernel[0, 1, 3, 7]


def test_diffusers_files_and_back():
    tensors = of_diffusers()
    assert len(tensors) == 2 + 2 * (10 + 4 + 5) + 4
    assert_equal(table.load(their.DIFFUSERS, shapes(), their.shared(tensors)), PARAMS)
    one = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_2.bias"
    np.testing.assert_array_equal(tensors[one], tensors[one.replace("blocks.1", "blocks.0")])


def test_what_a_file_keeps_beside_the_parameters_must_follow_from_them():
    moved = original() | {"pos_embed": original()["pos_embed"] + 0.01}
    with pytest.raises(table.Mismatch, match="not the fixed sinusoids of a square grid"):
        their.original(moved)
    own = of_diffusers()
    name = "transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"
    own[name] = own[name] + 0.01
    with pytest.raises(table.Mismatch, match="whose blocks have embeddings of their own"):
        their.shared(own)


def test_weights_of_another_depth_are_named():
    deeper = their.shapes(dit.DiT(width=12, depth=3, heads=3, variance=True), CLASSES, CHANNELS)
    with pytest.raises(table.Mismatch, match=r"10 tensors are missing: 'blocks\.2\.adaLN"):
        table.load(their.ORIGINAL, deeper, their.original(original()))


def test_configs_and_back():
    config = json.loads(
        '{"_class_name": "DiTTransformer2DModel", "_diffusers_version": "0.12.0.dev0", "activation_fn": '
        '"gelu-approximate", "attention_bias": true, "attention_head_dim": 72, "dropout": 0.0, "in_channels": 4, '
        '"norm_elementwise_affine": false, "norm_num_groups": 32, "norm_type": "ada_norm_zero", "num_attention_heads": '
        '16, "num_embeds_ada_norm": 1000, "num_layers": 28, "out_channels": 8, "patch_size": 2, "sample_size": 32, '
        '"upcast_attention": false}'
    )
    network, classes = their.from_config(config)
    assert network == dit.DiT(width=1152, depth=28, heads=16, patch=2, variance=True)
    assert classes == 1000
    back = their.to_config(network, classes, 4, 32)
    assert {k: config[k] for k in back} == back
    assert their.from_config(back) == (network, classes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(norm_type="ada_norm"), "norm_type = 'ada_norm'"),
        (dict(out_channels=6), "in_channels=4 and out_channels=6"),
        (dict(caption_channels=4096), "caption_channels = 4096"),
    ],
)
def test_configs_that_we_lack_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        their.from_config(their.to_config(NETWORK, CLASSES, CHANNELS, SIDE) | change)


def test_networks_that_diffusers_lacks_are_named():
    with pytest.raises(ValueError, match=r"patch=\(1, 2\) one number"):
        their.to_config(dit.DiT(width=12, depth=1, heads=3, patch=(1, 2)), 5, 4, 8)
