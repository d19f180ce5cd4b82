"""LoRA: the mathematics of its kinds in our axes, the names in files, and what does not fit."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import tree
from ldm_jax.training import sharding
from ldm_jax.weights import clip as their_clip
from ldm_jax.weights import files, lora, lora_files, table
from ldm_jax.weights import unet as their_unet
from tests.drawn import like
from tests.test_weights import unet_shapes
from tests.tiny import assert_equal

ROWS = (
    table.Row("down_{i}/attn/out", "down_blocks.{i}.attn1.to_out.0"),
    table.Row("down_{i}/attn/{qkv}", "down_blocks.{i}.attn1.to_{qkv}"),
    table.Row("down_{i}/cross_attn/k", "down_blocks.{i}.attn2.to_k"),
    table.Row("conv", "conv_in"),
)
ORIGINAL = (
    *(
        table.Row(f"down_0/attn/{x}", "input_blocks.1.1.qkv", table.Layout(1, 1, i, 3, 2))
        for i, x in enumerate("qkv")
    ),
    table.Row("conv", "input_blocks.0.0"),
)
SHAPES = {
    "down_0": {
        "attn": {name: {"kernel": (6, 8)} for name in "qkv"} | {"out": {"kernel": (8, 6)}},
        "cross_attn": {"k": {"kernel": (10, 8), "bias": (8,)}},
    },
    "conv": {"kernel": (3, 5, 4, 6)},
}
Q, CONV = "down_0/attn/q/kernel", "conv/kernel"
TO_Q = "unet.down_blocks.0.attn1.to_q"


def params(dtype=jnp.float32):
    shapes = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, dtype), SHAPES, is_leaf=lambda s: isinstance(s, tuple)
    )
    return like(shapes)


def names(*tables):
    return lora_files.their_names({"unet": (params(), tables or (ROWS,))})


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def halves(module, down, up, alpha=None):
    found = {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
    return found if alpha is None else found | {f"{module}.alpha": np.float32(alpha)}


def changes(tensors, *tables, **settings):
    """The changes of a file, in the axes of torch."""
    read = lora_files.read(tensors, names(*tables), **settings)["unet"]
    return {n: np.moveaxis(np.asarray(lora.change(d)), (-1, -2), (0, 1)) for n, d in read.items()}


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_merged_kernels_are_the_formula():
    a, b = random(2, 6), random(8, 2, seed=1)
    down, up = random(3, 4, 3, 5), random(6, 3, 1, 1, seed=1)
    tensors = halves(TO_Q, a, b, alpha=3) | halves("unet.conv_in", down, up)
    read = lora_files.read(tensors, names())["unet"]
    old = params()
    new = lora.merge(old, [read], [0.5])
    close(new["down_0"]["attn"]["q"]["kernel"] - old["down_0"]["attn"]["q"]["kernel"],
          0.5 * 3 / 2 * (b @ a).T)  # fmt: skip
    close(new["conv"]["kernel"] - old["conv"]["kernel"],
          0.5 * np.einsum("or,rihw->hwio", up[..., 0, 0], down))  # fmt: skip
    assert new["down_0"]["cross_attn"] is not None
    assert_equal(new["down_0"]["cross_attn"], old["down_0"]["cross_attn"])
    assert_equal(new["down_0"]["attn"]["out"], old["down_0"]["attn"]["out"])


def test_dora_gives_columns_the_lengths_of_the_file():
    a, b, lengths = random(2, 6), random(8, 2, seed=1), np.abs(random(8, 1, seed=2))
    down, up = random(3, 4, 3, 5), random(6, 3, 1, 1, seed=1)
    tensors = halves(TO_Q, a, b) | {f"{TO_Q}.dora_scale": lengths}
    tensors |= halves("unet.conv_in", down, up)
    tensors |= {"unet.conv_in.lora_magnitude_vector": np.full((1, 6, 1, 1), 2, np.float32)}
    read = lora_files.read(tensors, names())["unet"]
    old = params()
    new = lora.merge(old, [read], [0.5])
    changed = old["down_0"]["attn"]["q"]["kernel"].T + 0.5 * b @ a
    expected = lengths * changed / np.linalg.norm(changed, axis=1, keepdims=True)
    close(new["down_0"]["attn"]["q"]["kernel"], expected.T)
    close(np.linalg.norm(new["conv"]["kernel"].reshape(-1, 6), axis=0), 2 * np.ones(6))
    aside = jax.jit(lora.applied)(old, [read], [0.5])
    jax.tree.map(close, aside, new)
    with pytest.raises(ValueError, match="LoHa, LoKr or DoRA"):
        lora.export(read, "unet", ROWS)


def test_several_at_once_and_back_again():
    first = lora_files.read(halves(TO_Q, random(2, 6), random(8, 2)), names())["unet"]
    both = halves(TO_Q, random(4, 6, seed=2), random(8, 4, seed=3))
    both |= halves("unet.conv_in", random(3, 4, 3, 5), random(6, 3, 1, 1))
    second = lora_files.read(both, names())["unet"]
    old = params()
    together = lora.merge(old, [first, second], [0.7, -0.4])
    apart = lora.merge(lora.merge(old, [second], [-0.4]), [first], [0.7])
    jax.tree.map(close, together, apart)
    assert np.abs(together["conv"]["kernel"] - old["conv"]["kernel"]).max() > 0.1
    jax.tree.map(close, lora.merge(together, [first, second], [-0.7, 0.4]), old)


def test_the_middle_of_locon_is_a_convolution_between_two_1x1():
    def conv(x, w):
        return jax.lax.conv(x, jnp.asarray(w), (1, 1), "SAME")

    down, mid, up = random(2, 4, 1, 1), random(3, 2, 3, 5, seed=1), random(6, 3, 1, 1, seed=2)
    mid = mid[:2]
    up = up[:, :2]
    tensors = {
        "lora_unet_conv_in.lora_down.weight": down,
        "lora_unet_conv_in.lora_mid.weight": mid,
        "lora_unet_conv_in.lora_up.weight": up,
        "lora_unet_conv_in.alpha": np.float32(4),
    }
    kernel = changes(tensors)[CONV]
    x = random(1, 4, 7, 9)
    close(conv(x, kernel), 4 / 2 * conv(conv(conv(x, down), mid), up))


def test_loha_and_lokr():
    def named(kind, module="lora_unet_conv_in", **parts):
        return {f"{module}.{kind}_{part}": x for part, x in parts.items()}

    a, b = [random(6, 2, seed=i) for i in (0, 1)], [random(2, 60, seed=i) for i in (2, 3)]
    alpha = {"lora_unet_conv_in.alpha": np.float32(3)}
    found = changes(named("hada", w1_a=a[0], w1_b=b[0], w2_a=a[1], w2_b=b[1]) | alpha)
    close(found[CONV], 3 / 2 * ((a[0] @ b[0]) * (a[1] @ b[1])).reshape(6, 4, 3, 5))
    w1, w2 = random(3, 2), random(2, 2, 3, 5)
    whole = np.kron(w1[:, :, None, None], w2)
    close(
        changes(named("lokr", w1=w1, w2=w2) | alpha)[CONV], whole
    )  # alpha counts with a rank only
    a, b = random(3, 1), random(1, 2)
    found = changes(named("lokr", w1_a=a, w1_b=b, w2=w2) | alpha)
    close(found[CONV], 3 * np.kron((a @ b)[:, :, None, None], w2))
    a, b = random(2, 5), random(5, 30)
    found = changes(named("lokr", w1=w1, w2_a=a, w2_b=b) | alpha)
    close(found[CONV], 3 / 5 * np.kron(w1[:, :, None, None], (a @ b).reshape(2, 2, 3, 5)))


def test_1x1_convolutions_are_matrices():
    a, b = random(2, 6), random(8, 2)
    assert_equal(
        changes(halves(TO_Q, a[..., None, None], b[..., None, None])), changes(halves(TO_Q, a, b))
    )


def test_other_weights_do_not_compile_anew():
    first = lora_files.read(halves(TO_Q, random(2, 6), random(8, 2)), names())["unet"]
    other = jax.tree.map(lambda x: x + 1, first)
    old, count = params(), 0

    @jax.jit
    def kernel(params, loras, weights):
        nonlocal count
        count += 1
        return lora.applied(params, loras, weights)

    for loras, weights in (([first, other], [1.0, 0.5]), ([other, first], [-2.0, 0.0])):
        jax.tree.map(close, kernel(old, loras, weights), lora.merge(old, loras, weights))
    assert count == 1
    # Both halves can be trained.
    grads = jax.grad(
        lambda d: jnp.sum(lora.applied(old, [d], [1.0])["down_0"]["attn"]["q"]["kernel"])
    )(first)
    close(grads[Q].down, np.tile(first[Q].up.sum(1), (6, 1)))


def test_sums_are_in_float32_and_types_and_shardings_stay():
    a, b = random(2, 6).astype(np.float16), random(8, 2).astype(np.float16)
    read = lora_files.read(halves(TO_Q, a, b), names())["unet"]
    assert read[Q].down.dtype == np.float16
    old = params(jnp.bfloat16)
    mesh = sharding.make_mesh(data=1, fsdp=8)
    where = jax.NamedSharding(mesh, jax.P(None, "fsdp"))
    old["down_0"]["attn"]["q"]["kernel"] = jax.device_put(
        old["down_0"]["attn"]["q"]["kernel"], where
    )
    kernel = old["down_0"]["attn"]["q"]["kernel"]
    new = lora.merge(old, [read, read], [0.3, 0.4])["down_0"]["attn"]["q"]["kernel"]
    change = (b.astype(np.float32) @ a.astype(np.float32)).T
    expected = np.asarray(kernel, np.float32) + np.float32(0.3) * change + np.float32(0.4) * change
    np.testing.assert_array_equal(new, expected.astype(jnp.bfloat16))
    assert (new.dtype, new.sharding) == (kernel.dtype, where)


SPELLINGS = {
    "unet.down_blocks.0.attn1.to_out.0.lora_{A}.weight": "AB",
    "unet.down_blocks.0.attn1.to_out.0.lora_{A}.default.weight": "AB",
    "base_model.model.down_blocks.0.attn1.to_out.0.lora_{A}.weight": "AB",
    "unet.down_blocks.0.attn1.to_out.0.lora.{A}.weight": ("down", "up"),
    "unet.down_blocks.0.attn1.processor.to_out_lora.{A}.weight": ("down", "up"),
    "down_blocks.0.attn1.processor.to_out_lora.{A}.weight": ("down", "up"),
    "lora_unet_down_blocks_0_attn1_to_out_0.lora_{A}.weight": ("down", "up"),
    "diffusion_model.down_blocks.0.attn1.to_out.0.lora_{A}.weight": ("down", "up"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_means_the_same(spelling):
    down, up = random(2, 8), random(6, 2, seed=1)
    parts = dict(zip(SPELLINGS[spelling], (down, up), strict=True))
    found = changes({spelling.format(A=part): x for part, x in parts.items()})
    assert found.keys() == {"down_0/attn/out/kernel"}
    close(found["down_0/attn/out/kernel"], up @ down)


@pytest.mark.parametrize(
    "spelling",
    [
        "text_encoder.text_model.encoder.layers.1.self_attn.q_proj.lora_linear_layer.{}.weight",
        "text_encoder.text_model.encoder.layers.1.self_attn.to_q_lora.{}.weight",
        "text_encoder.encoder.layers.1.self_attn.q_proj.lora.{}.weight",
        "lora_te_text_model_encoder_layers_1_self_attn_q_proj.lora_{}.weight",
        "lora_te1_text_model_encoder_layers_1_self_attn_q_proj.lora_{}.weight",
    ],
)
def test_every_spelling_of_text_encoders_means_the_same(spelling):
    layers = {"layer_1": {"attn": {"q": {"kernel": jnp.zeros((4, 4))}}}}
    found = lora_files.their_names(
        {
            "unet": (params(), [ROWS]),
            "text_encoder": (layers, [their_clip.text_table()]),
            "text_encoder_2": (layers, [their_clip.text_table()]),
        }
    )
    tensors = {spelling.format("down"): random(2, 4), spelling.format("up"): random(4, 2)}
    read = lora_files.read(tensors, found)
    assert {c: list(x) for c, x in read.items()} == {"text_encoder": ["layer_1/attn/q/kernel"]}
    tensors = {n.replace("te_", "te1_").replace("te1_", "te2_"): x for n, x in tensors.items()}
    if spelling.startswith("lora_"):
        assert lora_files.read(tensors, found).keys() == {"text_encoder_2"}


def test_blocks_in_the_original_numbers_and_several_kernels_in_one_tensor():
    # q, k and v of a head lie together.
    down, up = random(2, 6), random(24, 2, seed=1)
    tensors = {
        "lora_unet_input_blocks_1_1_qkv.lora_down.weight": down[..., None],
        "lora_unet_input_blocks_1_1_qkv.lora_up.weight": up[..., None],
        "lora_unet_input_blocks_0_0.lora_down.weight": random(2, 4, 3, 5),
        "lora_unet_input_blocks_0_0.lora_up.weight": random(6, 2, 1, 1),
    }
    found = changes(tensors, ROWS, ORIGINAL)
    assert found.keys() == {*(f"down_0/attn/{x}/kernel" for x in "qkv"), CONV}
    k = (up @ down).reshape(2, 3, 4, 6)[:, 1].reshape(8, 6)
    close(found["down_0/attn/k/kernel"], k)


def test_names_of_stable_diffusion_1():
    # The trainer of kohya tells that it creates 192 modules for this U-Net.
    shapes = unet_shapes(768, width=320, mults=(1, 2, 4, 4), attention=(1, 1, 1, 0), heads=8)
    found = lora_files.their_names({"unet": (shapes, [their_unet.table()])})
    ours = [n for n in found if n.startswith("lora_unet_") and "_attentions_" in n]
    assert len(ours) == 192
    assert "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_attn2_to_out_0" in ours
    kernels = {leaf.name for leaves in found.values() for leaf in leaves}
    assert kernels == {n for n in tree.names(shapes) if n.endswith("/kernel")}


def test_alphas_of_the_header(tmp_path):
    settings = {
        "unet.lora_alpha": 6,
        "unet.alpha_pattern": {"attn1.to_k": 5, r"^down_blocks.\d.attn2.to_k": 7},
    }
    a, b = random(2, 6), random(8, 2)
    tensors = halves(TO_Q, a, b) | halves(TO_Q[:-1] + "k", a, b)
    tensors |= halves("unet.down_blocks.0.attn2.to_k", random(2, 10), b)
    header = {"lora_adapter_metadata": json.dumps(settings)}
    read = lora_files.read(tensors, names(), header)["unet"]
    alphas = {n: float(d.alpha) for n, d in read.items()}
    assert alphas == {Q: 6, "down_0/attn/k/kernel": 5, "down_0/cross_attn/k/kernel": 7}
    header = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 6, "unet.use_rslora": True})}
    close(changes(halves(TO_Q, a, b), metadata=header)[Q], 6 / 2**0.5 * b @ a)
    files.write(tmp_path / "x.safetensors", tensors)
    assert files.metadata(tmp_path / "x.safetensors") == {"format": "pt"}
    assert {
        float(d.alpha)
        for d in lora_files.load(tmp_path / "x.safetensors", names())["unet"].values()
    } == {2.0}
    with pytest.raises(FileNotFoundError, match="no file"):
        files.metadata(tmp_path / "y.safetensors")


def test_all_that_does_not_fit_is_told_at_once():
    a, b = random(2, 6), random(8, 2)
    tensors = halves(TO_Q, a, b)
    with pytest.raises(table.Mismatch) as error:
        lora_files.read(
            halves("unet.down_blocks.0.attn2.to_k", random(2, 768), b)
            | halves(TO_Q, random(3, 6), b)
            | halves("unet.down_blocks.0.attn1.to_vv", a, b)
            | {"unet.down_blocks.0.attn1.to_k.lora_A.weight": a, "what": a}
            | {"unet.conv_in.lora_A.weight": random(2, 4, 3, 3), "unet.conv_in.lora_B.weight": random(6, 2)}
            | {"unet.down_blocks.0.attn1.to_v.alpha": np.float32(2)},
            names(),
        )  # fmt: skip
    told = str(error.value)
    assert (
        "another base model, whose cross-attention reads tokens of width 768 instead of 10" in told
    )
    assert "'unet.down_blocks.0.attn2.to_k' (8, 768) instead of (8, 10)" in told
    assert "'unet.conv_in' (6, 4, 3, 3) instead of (6, 4, 3, 5)" in told
    assert (
        "1 modules have halves of different ranks: 'unet.down_blocks.0.attn1.to_q' (2, 3)" in told
    )
    assert "(nearest: 'unet.down_blocks.0.attn1.to_v')" in told
    assert "3 tensors have unknown names" in told
    assert "2 modules lack a part: 'unet.down_blocks.0.attn1.to_k' has ['down'] and no up" in told
    for name, kind in {
        "lora_unet_conv_in.diff": "whole differences",
        f"{TO_Q}.lora_B.bias": "biases",
    }.items():
        with pytest.raises(table.Mismatch, match=f"1 tensors are not supported: .*{kind}"):
            lora_files.read(tensors | {name: random(8)}, names())
    with pytest.raises(table.Mismatch, match="kernels are changed twice"):
        lora_files.read(tensors | halves(TO_Q.removeprefix("unet."), a, b), names())
    with pytest.raises(table.Mismatch, match="tensors are there twice"):
        lora_files.read(tensors | {f"{TO_Q}.lora_A.other.weight": a}, names())
    with pytest.raises(table.Mismatch, match="of two kinds at once"):
        lora_files.read(tensors | {f"{TO_Q}.lokr_w1": a}, names())
    with pytest.raises(table.Mismatch, match=r"does not divide \(8, 6\)"):
        lora_files.read({f"{TO_Q}.lokr_w1": random(3, 5), f"{TO_Q}.lokr_w2": random(2, 2)}, names())
    with pytest.raises(table.Mismatch, match="no matrices or numbers"):
        lora_files.read(tensors | {f"{TO_Q}.alpha": random(2)}, names())
    for wrong in (random(6), random(1, 8), random(8, 2)):
        with pytest.raises(table.Mismatch, match="magnitudes that are not one an output"):
            lora_files.read(tensors | {f"{TO_Q}.dora_scale": wrong}, names())
    parts = {"lokr_w1": random(4, 2), "lokr_w2": random(2, 3)}
    krons = {f"{TO_Q}.{part}": x for part, x in parts.items()}
    with pytest.raises(table.Mismatch, match="LoKr with magnitudes"):
        lora_files.read(krons | {f"{TO_Q}.dora_scale": random(8, 1)}, names())
    parts = {"lokr_w1": random(4, 2), "lokr_w2": random(6, 3)}
    fused = {f"lora_unet_input_blocks_1_1_qkv.{part}": x for part, x in parts.items()}
    with pytest.raises(table.Mismatch, match="several of our kernels"):
        lora_files.read(fused, names(ORIGINAL))


def test_names_that_are_not_wanted_are_left_out():
    tensors = halves(TO_Q, random(2, 6), random(8, 2))
    more = tensors | {"lora_te_text_model_x.alpha": np.float32(1)}
    with pytest.raises(table.Mismatch, match="unknown names"):
        lora_files.read(more, names())
    found = lora_files.read(more, names(), ignore=("lora_te_",))
    assert_equal(found, lora_files.read(tensors, names()))


def test_tables_that_contradict_each_other_are_told():
    leaves = {"a_b": {"kernel": jnp.zeros((2, 2))}, "c": {"kernel": jnp.zeros((2, 2))}}
    rows = (table.Row("a_b", "a_b"), table.Row("c", "a.b"))
    with pytest.raises(
        ValueError, match=r"'lora_unet_a_b' would mean both 'a_b/kernel' and 'c/kernel'"
    ):
        lora_files.their_names({"unet": (leaves, [rows])})


def test_loras_of_other_parameters_and_missing_weights_are_told():
    read = lora_files.read(halves(TO_Q, random(2, 6), random(8, 2)), names())["unet"]
    with pytest.raises(ValueError, match="1 LoRAs have 2 weights"):
        lora.merge(params(), [read], [1.0, 2.0])
    with pytest.raises(ValueError, match=r"1 leaves are not there \('down_0/attn/q/kernel'\)"):
        lora.merge({"conv": {"kernel": jnp.zeros((3, 5, 4, 6))}}, [read], [1.0])
    other = {"down_0": {"attn": {"q": {"kernel": jnp.zeros((6, 9))}}}}
    with pytest.raises(ValueError, match=r"'down_0/attn/q/kernel' \(6, 8\) instead of \(6, 9\)"):
        lora.applied(other, [read], [1.0])


def test_export_is_the_inverse_of_reading():
    tensors = halves(TO_Q, random(2, 6).astype(np.float16), random(8, 2).astype(np.float16))
    tensors |= halves("unet.conv_in", random(3, 4, 3, 5), random(6, 3, 1, 1))
    read = lora_files.read(tensors, names())["unet"]
    written = lora.export(read, "unet", ROWS)
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert written[name].dtype == tensor.dtype
        assert written[name].tobytes() == tensor.tobytes()
    # Alphas and middles go into the halves.
    mid = random(3, 3, 3, 5)
    middle = {
        "unet.conv_in.lora_down.weight": random(3, 4, 1, 1),
        "unet.conv_in.lora_mid.weight": mid,
        "unet.conv_in.lora_up.weight": random(6, 3, 1, 1),
        "unet.conv_in.alpha": np.float32(5),
    }
    again = lora.export(lora_files.read(middle, names())["unet"], "unet", ROWS)
    assert again["unet.conv_in.lora_A.weight"].shape == (3, 4, 3, 5)
    close(changes(again)[CONV], changes(middle)[CONV])
    with pytest.raises(
        ValueError, match="no tensor of its own for our leaf 'down_0/attn/q/kernel'"
    ):
        lora.export({Q: read[Q]}, "unet", ORIGINAL)
    kron = {f"{TO_Q}.lokr_w1": random(4, 3), f"{TO_Q}.lokr_w2": random(2, 2)}
    with pytest.raises(ValueError, match="LoHa, LoKr or DoRA and no product of two"):
        lora.export(lora_files.read(kron, names())["unet"], "unet", ROWS)


def test_a_new_lora_changes_nothing_and_can_be_trained():
    old = params()
    new = lora.init(old, "(down_0/attn/.*|conv)/kernel", 3, jax.random.key(0))
    assert new.keys() == {CONV, *(f"down_0/attn/{x}/kernel" for x in ("q", "k", "v", "out"))}
    assert new[CONV].down.shape == (3, 5, 4, 3)
    assert 0.9 < jnp.abs(new[CONV].down).max() * 60**0.5 <= 1
    assert_equal(lora.applied(old, [new], [1.0]), old)

    def loss(halves):
        deltas = {n: new[n]._replace(down=d, up=u) for n, (d, u) in halves.items()}
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(lora.applied(old, [deltas], [1.0])))

    halves = {name: (delta.down, delta.up) for name, delta in new.items()}
    grads = jax.grad(loss)(halves)
    stepped = jax.tree.map(lambda x, g: x - 0.1 * g, halves, grads)
    assert loss(stepped) < 0.99 * loss(halves)
    tensors = lora.export(new, "unet", ROWS)
    again = lora_files.read(tensors, names())["unet"]
    assert again.keys() == new.keys()
    np.testing.assert_array_equal(again[CONV].down, new[CONV].down)
    for pattern, rank in (("down_0/attn", 3), (".*", 0)):
        with pytest.raises(ValueError, match="makes no LoRA"):
            lora.init(old, pattern, rank, jax.random.key(0))
