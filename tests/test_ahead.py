"""Ahead of time: how gradients are joined, what that comes to, and the table of what was compiled."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import markdown
from ldm_jax.foresee import chips, collectives, study, table
from ldm_jax.training import joined, loop, sharding
from tests import tiny
from tests.test_foresee import refuse, sentence
from tests.test_loop import linear_run

MIB = 2**20
BYTES, COUNT = (f"xla_jf_crs_combiner_threshold_{of}" for of in ("in_bytes", "count"))


def several(platform, count):
    return [SimpleNamespace(platform=platform)] * count


def weights(*sizes):
    return [jax.ShapeDtypeStruct((size,), jnp.float32) for size in sizes]


def test_gradients_are_joined_on_several_tpus_alone():
    params = {"net": weights(300 * MIB, 7)}
    found = joined.options(several("tpu", 4), params)
    assert set(found) == {BYTES, COUNT}
    # A third of what the parameters take, rounded up; in three of that there is room for all.
    assert 3 * found[BYTES] >= 4 * (300 * MIB + 7) > 3 * (found[BYTES] - 1)
    assert found[COUNT] > 10_000
    few = joined.options(several("tpu", 4), {"net": weights(7)})
    assert few[BYTES] == 120 * MIB  # no less than by itself
    for other in (several("tpu", 1), several("gpu", 8), several("cpu", 8)):
        assert joined.options(other, params) == {}


def test_a_run_compiles_its_step_as_it_is_compiled_ahead(tmp_path, monkeypatch):
    """Whatever the options are, `train.py` hands them to the compiler: here one that this compiler refuses."""
    asked = []

    def options(devices, params):
        asked.append((len(devices), sum(leaf.size for leaf in jax.tree.leaves(params))))
        return {"no_such_option": 1}

    monkeypatch.setattr(joined, "options", options)
    run = linear_run()
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        loop.train(run, tmp_path)
    count = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(run.init, jax.random.key(0))))
    assert asked == [(run.mesh.size, count)]


@pytest.mark.slow
def test_options_change_how_many_all_reduces_there_are():
    pytest.importorskip("libtpu", reason="compiling ahead for TPUs needs `pip install libtpu`")
    mesh = sharding.make_mesh(devices=chips.devices("v5e:2x2"))
    everywhere, width, layers = sharding.replicated(mesh), 512, 8

    def call(params, x):
        def loss(params):
            h = x
            for w in params:
                h = jnp.tanh(h @ w)
            return (h**2).mean()

        grads = jax.grad(loss)(params)
        norm = sum((g**2).sum() for g in grads)
        return [jnp.where(norm < 1e6, w - g, w) for w, g in zip(params, grads, strict=True)]

    shape = jax.ShapeDtypeStruct((width, width), jnp.float32, sharding=everywhere)
    x = jax.ShapeDtypeStruct((64, width), jnp.float32)
    x = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.batch_layouts(mesh, x))
    inputs = {"params": [shape] * layers, "x": x}

    def reduced(options):
        program = study.Program(call, inputs, [everywhere] * layers, (0,), 64, options)
        made, _ = study.compile_program(program, mesh)
        found = collectives.read(made.as_text())
        assert {one.kind for one in found} == {"all-reduce"}
        assert sum(one.size for one in found) == layers * width**2 * 4
        return len(found)

    ours = joined.options(list(mesh.devices.flat), inputs["params"])
    assert reduced(ours) == 1
    assert reduced(ours | {BYTES: 2 * width**2 * 4}) == layers // 2
    assert reduced(ours | {COUNT: 3}) == 3


# --- the table


def figures(config="imagenet_f4", topology="v5e:16x16", **changes):
    memory = {"peak": 8.0 * 2**30, "of": 16.0 * 2**30, "code": 0.2 * 2**30}
    memory["foreseen"] = {"inputs": 5.0 * 2**30, "temporary": 2.5 * 2**30}
    return {
        "command": f"python -m ldm_jax.compile --config=configs/{config}.py --topology={topology}",
        "topology": topology,
        "slices": 1,
        "what": "train",
        "mesh": {"data": 256},
        "compile_cpu_seconds": 800.4,
        "batch_per_device": 8.0,
        "memory": memory,
        "collectives": {"all-reduce": {"count": 4, "small": 1, "bytes": 800 * MIB}},
        "seconds": {"compute": 0.04, "memory": 0.02, "links": 0.01, "bound": 0.04},
        "bound_by": "compute",
        "mfu_bound": 0.95,
        "rows_per_second_bound": 51_200.0,
    } | changes


def test_a_table_has_a_row_for_each_file_of_figures(tmp_path):
    given = {
        "b": figures("sd15_finetune", "v5p:4x8x8", slices=2, what="sample", collectives={}),
        "a": figures("sd15_finetune"),
        "c": figures(command="python -m ldm_jax.compile --config configs/demo.py"),
    }
    for name, of in given.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(of))
    found = table.read(tmp_path)
    assert [table.name(of) for of in found] == ["demo", "sd15_finetune", "sd15_finetune, sampler"]
    assert table.off(found[0]) == 7.5 / 8 - 1
    lines = markdown.table(table.HEAD, map(table.line, found)).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[3] == (
        "| sd15_finetune | v5e:16x16, data 256 | 8 | 8,192 of 16,384 | -6.2 % | 0, 4 (1 small) | 40.0, 20.0, 10.0 | "
        "95.0 %, by compute | 51,200 | 800 |"
    )
    assert "| 2 x v5p:4x8x8, data 256 |" in lines[4]
    assert "| 0, 0 |" in lines[4]
    del found[0]["memory"]["code"]  # of --nocode
    assert table.line(found[0])[-1] == "800, no code"
    bars = table.shares(found[:1])
    assert bars == [
        ("compute, demo v5e", 100.0),
        ("HBM, demo v5e", 50.0),
        ("links, demo v5e", 25.0),
    ]


def test_a_table_that_cannot_be_is_refused(tmp_path, capsys, monkeypatch):
    refuse([f"--table={tmp_path}"], monkeypatch)
    assert "there are no figures in" in sentence(capsys)
    (tmp_path / "other.json").write_text("[1, 2]")
    refuse([f"--table={tmp_path}"], monkeypatch)
    assert "other.json holds no figures" in sentence(capsys)


def test_the_committed_records_are_a_table():
    """Of chips whose memory they fit, with the number of chips that the topology says."""
    found = table.read(tiny.ROOT / "docs/benchmarks/ahead")
    shown = markdown.table(table.HEAD, map(table.line, found))
    assert shown in (tiny.ROOT / "docs/scale.md").read_text()
    for of in found:
        sides = map(int, of["topology"].partition(":")[2].split("x"))
        assert np.prod(list(sides)) * of["slices"] == of["devices"]
        assert of["memory"]["peak"] < of["memory"]["of"]
        if set(of["mesh"]) == {"data"}:
            assert set(of["collectives"]) == {"all-reduce"}
            assert of["collectives"]["all-reduce"]["count"] <= 5
