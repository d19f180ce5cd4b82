"""Tables of foreign weights, and safetensors files."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from ldm_jax import tree
from ldm_jax.models import autoencoder, unet
from ldm_jax.training import sharding
from ldm_jax.types import Cond
from ldm_jax.weights import autoencoder as their_autoencoder
from ldm_jax.weights import configs, files, table
from ldm_jax.weights import unet as their_unet
from tests.drawn import like
from tests.tiny import assert_equal


def unet_shapes(tokens=7, vector=0, **settings):
    network = unet.UNet(vector=vector, **settings)
    cond = Cond(
        vector=jnp.zeros((1, vector)) if vector else None,
        tokens=jnp.zeros((1, 5, tokens)) if tokens else None,
    )
    x = jax.ShapeDtypeStruct((1, 16, 16, 4), jnp.float32)
    return jax.eval_shape(network.init, jax.random.key(0), x, jnp.zeros(1), cond)["params"]


def autoencoder_shapes(**settings):
    x = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    init = autoencoder.KLAutoencoder(**settings).init
    return jax.eval_shape(init, jax.random.key(0), x, jax.random.key(1))["params"]


SMALL = dict(width=8, mults=(1, 2), blocks=1, groups=4)
FAMILIES = {
    "transformer": (
        their_unet.table(),
        lambda: unet_shapes(vector=3, attention=(0, 2), heads=2, **SMALL),
    ),
    "plain": (
        their_unet.table(transformer=False),
        lambda: unet_shapes(0, attention=(1, 1), heads=2, transformer=False, **SMALL),
    ),
    "resampling blocks": (
        their_unet.table(),
        lambda: unet_shapes(attention=(0, 1), heads=2, resample_blocks=True, **SMALL),
    ),
    "autoencoder": (
        their_autoencoder.table(),
        lambda: autoencoder_shapes(attention=(False, True), **SMALL),
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_out_and_in_again_is_the_identity(family, tmp_path):
    rows, shapes = FAMILIES[family]
    params = like(shapes())
    tensors = table.export(rows, params)
    files.write(tmp_path / "there" / "model.safetensors", tensors)
    assert [p.name for p in (tmp_path / "there").iterdir()] == ["model.safetensors"]
    read = files.read(tmp_path / "there" / "model.safetensors")
    again = table.load(rows, jax.eval_shape(lambda: params), read)
    assert_equal(again, params)
    back = table.export(rows, again)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].tobytes() == tensor.tobytes()


def test_names_and_numbers_of_the_tensors_of_stable_diffusion_1():
    # 686 and 248: the state dicts of diffusers' own models (tests/parity compares all names of small ones).
    shapes = unet_shapes(768, width=320, mults=(1, 2, 4, 4), attention=(1, 1, 1, 0), heads=8)
    names = [table.their_name(their_unet.table(), name) for name in tree.names(shapes)]
    assert None not in names
    assert len(set(names)) == 686
    assert "up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_k.weight" in names
    shapes = autoencoder_shapes(width=128, mults=(1, 2, 4, 4))
    names = [table.their_name(their_autoencoder.table(), name) for name in tree.names(shapes)]
    assert None not in names
    assert len(set(names)) == 248
    assert "encoder.mid_block.attentions.0.to_out.0.bias" in names


def test_kernels_turn_and_types_follow_the_network():
    rows = (table.Row("a/conv_{i}", "conv.{i}"), table.Row("dense", "fc"))
    shape = jax.ShapeDtypeStruct
    shapes = {
        "a": {"conv_3": {"kernel": shape((5, 4, 2, 7), jnp.bfloat16)}},
        "dense": {"kernel": shape((2, 6), jnp.float32), "bias": shape((6,), jnp.float32)},
    }
    rng = np.random.default_rng(0)
    theirs = {
        "conv.3.weight": rng.standard_normal((7, 2, 5, 4)).astype(np.float32),
        "fc.weight": rng.standard_normal((6, 2)).astype(ml_dtypes.bfloat16),
        "fc.bias": np.arange(6, dtype=np.float16),
    }
    params = table.load(rows, shapes, theirs)
    expected = theirs["conv.3.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(
        params["a"]["conv_3"]["kernel"], expected.astype(ml_dtypes.bfloat16)
    )
    np.testing.assert_array_equal(params["dense"]["kernel"], theirs["fc.weight"].T)
    assert jax.tree.map(lambda x: x.dtype, params) == jax.tree.map(lambda x: x.dtype, shapes)


class Unread:
    """A tensor that must not be read."""

    def __init__(self, shape):
        self.shape = shape

    def __array__(self, dtype=None, copy=None):
        raise AssertionError("read before all was checked")


def test_all_that_does_not_fit_is_told_at_once_and_before_reading():
    rows, shapes = FAMILIES["transformer"]
    shapes = shapes()
    tensors = {
        table.their_name(rows, name): Unread(table.their_shape(name, leaf.shape))
        for name, leaf in zip(tree.names(shapes), jax.tree.leaves(shapes), strict=True)
    }
    tensors["conv_inn.weight"] = tensors.pop("conv_in.weight")
    tensors["conv_out.bias"] = Unread((5,))
    with pytest.raises(table.Mismatch) as error:
        table.load(rows, shapes, tensors)
    told = str(error.value)
    assert "1 tensors are missing: 'conv_in.weight' (nearest: 'conv_inn.weight')" in told
    assert "1 tensors have another shape: 'conv_out.bias' (5,) instead of (4,)" in told
    assert "1 tensors are not used: 'conv_inn.weight'" in told
    with pytest.raises(table.Mismatch, match=r"no row in the table: 'extra/kernel'"):
        table.load(rows, {"extra": {"kernel": jax.ShapeDtypeStruct((2, 2), jnp.float32)}}, {})
    with pytest.raises(table.Mismatch, match="no row for our leaf 'extra/kernel'"):
        table.export(rows, {"extra": {"kernel": jnp.ones((2, 2))}})


def test_leaves_go_straight_to_their_shardings():
    rows, shapes = FAMILIES["autoencoder"]
    params = like(shapes())
    mesh = sharding.make_mesh(data=1, fsdp=8)
    name = "encoder/mid/res_0/conv1/kernel"

    def abstract(at, leaf):
        where = jax.NamedSharding(mesh, jax.P(None, None, None, "fsdp")) if at == name else None
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    loaded = table.load(rows, tree.map_named(abstract, params), table.export(rows, params))
    kernel = loaded["encoder"]["mid"]["res_0"]["conv1"]["kernel"]
    assert len(kernel.sharding.device_set) == 8
    assert kernel.addressable_shards[0].data.shape == (3, 3, 16, 2)
    assert_equal(loaded, params)


def test_files_that_cannot_be_read_are_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*model.safetensors"):
        files.read(tmp_path / "model.safetensors")
    whole = tmp_path / "a.safetensors"
    files.write(whole, {"x": np.ones((2, 3), np.float16), "y": np.zeros(4, ml_dtypes.bfloat16)})
    (tmp_path / "cut.safetensors").write_bytes(whole.read_bytes()[:-2])
    for name, content in {"cut": None, "text": b"not at all", "empty": b""}.items():
        path = tmp_path / f"{name}.safetensors"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}.safetensors cannot be read as safetensors"):
            files.read(path)


def test_arrays_are_written_whatever_their_order_in_memory(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    files.write(tmp_path / "a.safetensors", {"x": array.T, "y": np.float32(3)})
    read = files.read(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(read["x"], array.T)
    assert np.asarray(read["y"]).shape == ()


def test_an_index_gathers_several_files(tmp_path):
    files.write(tmp_path / "1.safetensors", {"x": np.ones((2, 3), np.float16)})
    files.write(tmp_path / "2.safetensors", {"y": np.zeros(4, ml_dtypes.bfloat16)})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "1.safetensors", "y": "2.safetensors"}}))
    read = files.read(index)
    assert {name: tensor.shape for name, tensor in read.items()} == {"x": (2, 3), "y": (4,)}
    assert np.asarray(read["y"]).dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(read["x"], np.ones((2, 3)))
    index.write_text(json.dumps({"weight_map": {"x": "2.safetensors"}}))
    with pytest.raises(ValueError, match=r"'x' in 2.safetensors"):
        files.read(index)
    index.write_text(json.dumps({"weight_map": {"x": "3.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"3.safetensors"):
        files.read(index)
    for broken in ("{", "[]", "{}", '{"weight_map": ["x"]}'):
        index.write_text(broken)
        with pytest.raises(ValueError, match="no index of safetensors files"):
            files.read(index)


def test_fused_and_turned_tensors():
    # q, k and v in one tensor: one after the other (OpenCLIP), or within each head (CompVis' plain attention, there as
    # a convolution over one axis); a projection that is stored the other way about; a leaf that is no layer's.
    layout = table.Layout
    heads, dim, width = 2, 3, 5
    rows = (
        *(table.Row(f"a/{x}", "a.qkv", layout(part=i, of=3)) for i, x in enumerate("qkv")),
        *(
            table.Row(f"b/{x}", "b.qkv", layout(ones=1, part=i, of=3, heads=heads))
            for i, x in enumerate("qkv")
        ),
        table.Row("c/kernel", "c_projection", layout(keep=True)),
        table.Row("position", "d.position_embedding"),
    )
    rng = np.random.default_rng(0)
    theirs = {
        "a.qkv.weight": rng.standard_normal((3 * heads * dim, width)),
        "a.qkv.bias": rng.standard_normal(3 * heads * dim),
        "b.qkv.weight": rng.standard_normal((3 * heads * dim, width, 1)),
        "b.qkv.bias": rng.standard_normal(3 * heads * dim),
        "c_projection": rng.standard_normal((width, 4)),
        "d.position_embedding": rng.standard_normal((7, width)),
    }
    theirs = {name: tensor.astype(np.float32) for name, tensor in theirs.items()}

    def dense(n, k):
        return {"kernel": jnp.zeros((n, k)), "bias": jnp.zeros(k)}

    shapes = {
        "a": {x: dense(width, heads * dim) for x in "qkv"},
        "b": {x: dense(width, heads * dim) for x in "qkv"},
        "c": {"kernel": jnp.zeros((width, 4))},
        "position": jnp.zeros((7, width)),
    }
    shapes = jax.eval_shape(lambda: shapes)
    ours = table.load(rows, shapes, theirs)
    k = np.split(theirs["a.qkv.weight"], 3)[1]
    np.testing.assert_array_equal(ours["a"]["k"]["kernel"], k.T)
    within = theirs["b.qkv.weight"][..., 0].reshape(heads, 3, dim, width)
    np.testing.assert_array_equal(
        ours["b"]["v"]["kernel"], within[:, 2].reshape(heads * dim, width).T
    )
    np.testing.assert_array_equal(
        ours["b"]["q"]["bias"], theirs["b.qkv.bias"].reshape(heads, 3, dim)[:, 0].ravel()
    )
    np.testing.assert_array_equal(ours["c"]["kernel"], theirs["c_projection"])
    np.testing.assert_array_equal(ours["position"], theirs["d.position_embedding"])
    back = table.export(rows, ours)
    assert back.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert back[name].tobytes() == tensor.tobytes(), name
    with pytest.raises(table.Mismatch, match=r"'a.qkv.weight' \(18, 4\) instead of \(18, 5\)"):
        table.load(rows, shapes, theirs | {"a.qkv.weight": np.zeros((18, 4))})


def test_a_config_that_asks_for_more_than_we_have_is_told():
    takes, only = {"width": 8, "heads": (1, 2)}, {"act": ("silu", "swish")}
    given = {"_class_name": "X", "heads": [4, 4], "act": "silu", "size": 64, "new": None, "old": []}
    read = configs.read(given, "net", takes, only, idle=("size",))
    assert read == {"width": 8, "heads": (4, 4)}
    with pytest.raises(
        ValueError, match=r"'mish' \(we have 'silu' or 'swish'\), new = 3 \(unknown\)"
    ):
        configs.read(given | {"act": "mish", "new": 3}, "net", takes, only, idle=("size",))
