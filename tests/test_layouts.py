"""Layouts are configs: on eight devices each of them learns what one device does, and lies where it says."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from ldm_jax import tree
from ldm_jax.nn import attention, conv, once
from ldm_jax.training import loop, optimizer, sharding, step
from tests.jaxprs import occurrences
from tests.test_loop import linear_run, restored
from tests.tiny import assert_equal, losses

TENSOR = (
    (".*_attn/[qkv]/kernel", (None, "tensor")),
    (".*_attn/out/kernel", ("tensor", None)),
    (".*/ff/in/kernel", (None, "tensor")),
    (".*/ff/in/bias", ("tensor",)),
    (".*/ff/out/kernel", ("tensor", None)),
    (".*", "replicate"),
)
LAYOUTS = {
    "data": (dict(data=8), ((".*", "replicate"),)),
    "fsdp": (dict(data=2, fsdp=4), ((".*", "fsdp"),)),
    "zero1": (dict(data=1, fsdp=8), ((".*", "zero1"),)),
    "tensor": (dict(data=2, tensor=4), TENSOR),
    "space": (dict(data=2, space=4), ((".*", "replicate"),)),
    "slices": (dict(data=2, fsdp=4, dcn=dict(data=2)), ((".*", "fsdp"),)),
}
LARGE = 15  # leaves of 64 elements and more: every kernel, and the bias of ff/in


class Network(nn.Module):
    """A convolution and a transformer block that reads tokens: what the large networks consist of."""

    @nn.compact
    def __call__(self, x, tokens):
        h = conv.Conv(16, name="conv_in")(x)
        h = attention.SpatialTransformer(heads=4, groups=4, name="attn")(h, tokens)
        return conv.Conv(x.shape[-1], name="conv_out")(h)


def loss(params, frozen, batch, rng, at):
    noise = jax.random.normal(rng, batch["x"].shape)
    y = Network().apply({"params": params["net"]}, batch["x"] + noise, batch["tokens"])
    return jnp.mean(jnp.square(y - noise)), {}


def batch():
    rng = np.random.default_rng(0)
    x, tokens = rng.standard_normal((8, 16, 8, 3)), rng.standard_normal((8, 5, 12))
    return {"x": x.astype(np.float32), "tokens": tokens.astype(np.float32)}


def fresh():
    one = jax.tree.map(lambda a: jnp.asarray(a[:1]), batch())
    made = Network().init(jax.random.key(0), one["x"], one["tokens"])["params"]
    # Large enough that rounding does not decide: Adam divides by |gradient|.
    return step.init_state({"net": made}, optimizer.adamw(steps=9, lr=1e-2, eps=1e-2))


def learnt(mesh, rules, steps=3):
    """Losses of three steps on a mesh, the state after them, and the compiled step."""
    shapes = jax.eval_shape(fresh)
    layouts = sharding.state_layouts(mesh, rules, shapes)
    state = jax.jit(fresh, out_shardings=layouts)()
    taken = step.make_train_step(loss, optimizer.adamw(steps=9, lr=1e-2, eps=1e-2))
    placed, key = sharding.place(mesh, batch()), jax.random.key(1)
    taken = jax.jit(taken, out_shardings=(layouts, sharding.replicated(mesh)))
    taken = taken.lower(state, {}, placed, key).compile()
    losses = []
    for _ in range(steps):
        state, metrics = taken(state, {}, placed, key)
        losses.append(float(metrics["loss"]))
    return losses, state, taken


@functools.cache
def on_one_device():
    mesh = sharding.make_mesh(data=1, devices=jax.devices()[:1])
    return learnt(mesh, ((".*", "replicate"),))[0]


def split(part):
    """By axis of the mesh: the names of the leaves that lie split over it."""
    found = {}
    for name, leaf in zip(tree.names(part), jax.tree.leaves(part), strict=True):
        assert math.prod(leaf.addressable_shards[0].data.shape) * math.prod(
            leaf.sharding.mesh.shape[axis] for axis in leaf.sharding.spec if axis
        ) == math.prod(leaf.shape)
        for axis in leaf.sharding.spec:
            found.setdefault(axis, set()).add(name)
    found.pop(None, None)
    return found


QUICK = ("fsdp",)


@pytest.mark.parametrize(
    "name",
    [*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in LAYOUTS if n not in QUICK)],
)
def test_a_layout_learns_what_one_device_does(name, monkeypatch):
    monkeypatch.setattr(sharding, "FSDP_MIN_SIZE", 64)
    axes, rules = LAYOUTS[name]
    mesh = sharding.make_mesh(**axes)
    losses, state, taken = learnt(mesh, rules)
    np.testing.assert_allclose(losses, on_one_device(), rtol=3e-6)  # sums in another order
    params, ema, moments = split(state.params), split(state.ema), split(state.opt_state)
    kinds = set(
        re.findall(
            r"\b(all-reduce|all-gather|reduce-scatter|collective-permute)\b", taken.as_text()
        )
    )
    if name in ("data", "space"):
        assert params == ema == moments == {}
        assert "all-gather" not in kinds or name == "space"
    if name == "space":
        assert "collective-permute" in kinds  # what convolutions exchange between neighbours
    if name in ("fsdp", "slices"):
        assert params == ema
        assert len(params["fsdp"]) == LARGE
        assert len(moments["fsdp"]) == 2 * LARGE
        assert "all-gather" in kinds
    if name == "zero1":
        assert params == {}
        assert len(ema["fsdp"]) == LARGE
        assert len(moments["fsdp"]) == 2 * LARGE
    if name == "tensor":
        assert params == ema
        assert len(params["tensor"]) == 11  # twice q, k, v and out; in, its bias, and out
        assert len(moments["tensor"]) == 22


def layered(params, frozen, batch, rng, at):
    """Two layers, with noise by the step's key."""
    x = batch["x"] + jax.random.normal(rng, batch["x"].shape)
    h = jnp.tanh(x @ params["net"]["first"])
    return jnp.mean(jnp.square(h @ params["net"]["second"] - batch["x"])), {}


def test_a_run_goes_on_on_fewer_devices_with_the_same_data_and_losses(tmp_path, monkeypatch):
    """On 8, 4 and 1 devices, in three layouts; arrays are those that were saved, to the bit."""
    monkeypatch.setattr(sharding, "FSDP_MIN_SIZE", 64)

    def init(key):
        first, second = (jax.random.normal(k, (3, 64)) / 8 for k in jax.random.split(key))
        return {"net": {"first": first, "second": second.T}}

    def on(count, rules, **axes):
        mesh = sharding.make_mesh(devices=jax.devices()[:count], **axes)
        frozen = jax.device_put(jnp.float32(3.0), sharding.replicated(mesh))
        tx = optimizer.adamw(steps=9, lr=5e-2, eps=1e-2)
        changed = dict(mesh=mesh, rules=((".*", rules),), frozen=frozen, init=init, loss=layered)
        unevaluated = dict(eval_every=100, evaluate=lambda *_: loop.Evaluation({}, {}))
        return linear_run(optimizer=tx, save_every=3, **unevaluated, **changed)

    runs = [on(8, "fsdp", data=2, fsdp=4), on(4, "zero1", data=1, fsdp=4), on(1, "replicate")]
    for steps, run, after in zip((3, 6, 9), runs, (*runs[1:], runs[0]), strict=True):
        assert loop.train(run._replace(steps=steps), tmp_path / "parts") == steps
        here, there = (restored(of, tmp_path / "parts") for of in (run, after))
        assert_equal(there, here)
        assert split(there.opt_state).keys() == ({"fsdp"} if after.mesh.size > 1 else set())
    loop.train(runs[0]._replace(steps=9), tmp_path / "whole")
    whole, parts = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert [line["step"] for line in parts] == list(range(1, 10))
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose(b["loss"], a["loss"], rtol=1e-6)
    first, moved = init(jax.random.key(0))["net"]["first"], there.params["net"]["first"]
    assert np.abs(moved - first).max() > 0.01  # it learnt, so that there is something to lose


def test_data_goes_over_space_along_its_longest_axis():
    mesh = sharding.make_mesh(data=2, space=4)
    placed = sharding.place(mesh, batch() | {"mask": np.ones((8, 16, 8, 1), bool)})
    shapes = {k: v.addressable_shards[0].data.shape for k, v in placed.items()}
    assert shapes == {"x": (4, 4, 8, 3), "tokens": (4, 5, 12), "mask": (4, 4, 8, 1)}
    np.testing.assert_array_equal(placed["x"], batch()["x"])
    wide = sharding.place(mesh, {"x": np.zeros((8, 4, 16, 3))})["x"]
    assert wide.addressable_shards[0].data.shape == (4, 4, 4, 3)
    with pytest.raises(ValueError, match=r"\(10, 6\) does not divide over space = 4"):
        sharding.check_space((10, 6), mesh)
    sharding.check_space((6, 12), mesh)


class Device:
    """What a mesh asks of a device."""

    def __init__(self, number, process, slice_index):
        self.id, self.process_index, self.slice_index = number, process, slice_index


def test_neighbours_in_the_mesh_are_neighbours_on_the_host_and_slices_lie_on_their_axis():
    # Numbered in rows over the hosts, as TPUs are: two slices of two hosts of four chips.
    devices = [Device(i, (i % 4) // 2 + 2 * (i // 8), i // 8) for i in range(16)]
    mesh = sharding.make_mesh(data=4, tensor=4, devices=devices)
    assert [{d.process_index for d in row.flat} for row in mesh.devices] == [{0}, {1}, {2}, {3}]
    mesh = sharding.make_mesh(data=4, fsdp=4, dcn=dict(data=2), devices=devices)
    assert [{d.slice_index for d in row.flat} for row in mesh.devices] == [{0}, {0}, {1}, {1}]
    mesh = sharding.make_mesh(data=4, fsdp=4, dcn=dict(fsdp=2), devices=devices)
    columns = np.moveaxis(mesh.devices, 1, 0)
    assert [{d.slice_index for d in column.flat} for column in columns] == [{0}, {0}, {1}, {1}]
    for axes, words in (
        (dict(data=4, fsdp=4, dcn=dict(data=4)), r"does not fit the 2 slice\(s\)"),
        (dict(data=4, fsdp=4, dcn=dict(data=3)), "dcn.data = 3 does not divide"),
        (dict(data=4, fsdp=4, dcn=dict(date=2)), "'date'"),
    ):
        with pytest.raises(ValueError, match=words):
            sharding.make_mesh(devices=devices, **axes)


def test_processes_that_hold_the_same_rows_feed_the_same(monkeypatch):
    def shares(slices=1, **axes):
        devices = [Device(i, i // 4, i * slices // 16) for i in range(16)]
        mesh, found = sharding.make_mesh(devices=devices, **axes), []
        for i in range(4):
            monkeypatch.setattr(jax, "process_index", lambda i=i: i)
            found.append(sharding.share.__wrapped__(mesh))
        return found

    assert shares(data=16) == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert shares(data=2, fsdp=8) == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert shares(data=2, tensor=8) == [(0, 2), (0, 2), (1, 2), (1, 2)]
    with pytest.raises(ValueError, match=r"process 0 would feed the parts \[0, 1, 8, 9\]"):
        shares(4, data=2, fsdp=8, dcn=dict(fsdp=4))


def test_remat_keeps_what_its_name_says():
    x, key = jnp.ones((1, 3, 8)), jax.random.key(0)

    def products(remat):
        block = once.once(attention.FeedForward, remat)()
        variables = block.init(key, x)
        gradient = jax.grad(lambda v: jnp.sum(jnp.square(block.apply(v, x))))
        return occurrences(jax.make_jaxpr(gradient)(variables).jaxpr, ("dot_general",))

    kept, again = products(False), products(True)
    assert again > kept > 0
    for name in once.KEEP:
        assert products(name) == kept
    with pytest.raises(ValueError, match="remat = 'dots' is unknown; choose True, False or one of"):
        products("dots")
