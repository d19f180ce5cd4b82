"""Ahead of time: what is read from a compiled program, and what a config is before there is data."""

import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import build
from ldm_jax.build import plan, variants
from ldm_jax.foresee import chips, collectives, settled, study
from ldm_jax.foresee import text as program_text
from ldm_jax.training import compiled, loop, sharding
from tests import model_folders, tiny
from tests.test_cli import sentence
from tests.test_configs import config_of
from tests.tiny import quick_compiles  # noqa: F401 (a fixture)

TEXT = """
HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter.3 (input: f32[64,16]) -> f32[16,16] {
  %all-reduce.4 = f32[64,16]{1,0:T(8,128)} all-reduce(%input), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %cut = f32[16,16]{1,0} dynamic-slice(%all-reduce.4, %i, %j)
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %all-reduce.1 = (f32[3,3,4,8]{3,2,1,0:T(8,128)}, bf16[8]{0}) all-reduce(%g, %h), replica_groups=[1,4]<=[4]
  %all-gather-start.2 = (f32[4,8]{1,0}, f32[16,8]{1,0}) all-gather-start(%w), replica_groups=[1,4]<=[4]
  %all-gather-done.2 = f32[16,8]{1,0} all-gather-done(%all-gather-start.2)
  %all-reduce-scatter.7 = f32[16,16]{1,0} fusion(%grads), kind=kCustom, calls=%all-reduce-scatter.3
  %reduce-scatter.9 = f32[2,8]{1,0} reduce-scatter(%k), replica_groups=[2,4]<=[8], to_apply=%add
  %collective-permute-start.1 = (bf16[2,8]{1,0}, bf16[2,8]{1,0}, u32[], u32[]) collective-permute-start(%x)
  %collective-permute-done.1 = bf16[2,8]{1,0} collective-permute-done(%collective-permute-start.1)
  %reduce-scatter.10 = f32[2]{0} reduce-scatter(%y), replica_groups=mesh['a'=4,'b'=2,'c'=2], device_ids=([8]) {'a','c'}
  %reduce-scatter.11 = f32[2]{0} reduce-scatter(%z), replica_groups={{0,1},{2,3}}, dimensions={0}, to_apply=%add
  ROOT %out = f32[8]{0} fusion(%all-reduce.1), kind=kLoop, calls=%fused
}
"""


def test_collectives_are_counted_with_their_bytes():
    found = collectives.read(TEXT)
    assert set(found) == {
        collectives.Collective("reduce-scatter", 64 * 16 * 4),
        collectives.Collective("all-reduce", 3 * 3 * 4 * 8 * 4 + 8 * 2),
        collectives.Collective("all-gather", 16 * 8 * 4),
        collectives.Collective("reduce-scatter", 4 * 2 * 8 * 4),
        collectives.Collective("reduce-scatter", 8 * 2 * 4),
        collectives.Collective("reduce-scatter", 2 * 2 * 4),
        collectives.Collective("collective-permute", 2 * 8 * 2),
    }
    of_all = {"count": 4, "small": 3, "bytes": 4352 + 80}
    assert collectives.summary(found)["reduce-scatter"] == of_all
    assert collectives.moved(found) == 4432 + 2 * 1168 + 512 + 32


CHIP = chips.Chip(memory=1e6, flops=1e9, bandwidth=1e6, links=1e3)


def product(mesh):
    """The gradient of a linear layer, data parallel: 2 m k n operations forward, as many backward."""

    def call(w, x):
        return jax.grad(lambda w: jnp.sum(jnp.square(x @ w)))(w)

    everywhere = sharding.replicated(mesh)
    w = jax.ShapeDtypeStruct((32, 16), jnp.float32, sharding=everywhere)
    x = jax.ShapeDtypeStruct((64, 32), jnp.float32)
    x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=sharding.batch_layouts(mesh, x))
    return study.Program(call, {"weights": w, "batch": x}, everywhere, (), 64)


def test_a_program_is_held_against_a_chip():
    mesh = sharding.make_mesh()
    program = product(mesh)
    made, spent = study.compile_program(program, mesh)
    flops = 2 * 2 * 64 * 32 * 16
    found = study.study(
        study.executable(made),
        program,
        mesh,
        CHIP,
        flops,
        2 * flops,
        {"inputs": 7.0, "temporary": 3.0},
    )
    assert spent.wall > 0
    assert spent.cpu > 0
    assert found["memory"]["foreseen"] == {"inputs": 7.0, "temporary": 3.0}
    assert found["memory"]["inputs"] == {"weights": 32 * 16 * 4, "batch": 8 * 32 * 4}
    assert found["memory"]["inputs_by_xla"] == 32 * 16 * 4 + 8 * 32 * 4
    assert found["collectives"] == {"all-reduce": {"count": 1, "small": 1, "bytes": 32 * 16 * 4}}
    # The gradient leaves a chip twice, and that takes longest.
    assert found["bound_by"] == "links"
    assert found["seconds"]["bound"] == 2 * 32 * 16 * 4 / 1e3
    assert found["seconds"]["compute"] == 2 * flops / 8 / 1e9
    np.testing.assert_allclose(found["mfu_bound"], flops / 8 / 1e9 / found["seconds"]["bound"])
    assert found["rows_per_second_bound"] == 64 / found["seconds"]["bound"]
    np.testing.assert_allclose(found["flops"]["xla"], flops / 8, rtol=0.2)
    assert "all-reduce: 1 (1 of them small), " in study.told(found)


def test_a_chip_of_two_devices_is_shared():
    half = chips.CHIPS["tpu7x"].of_device()
    assert (half.memory, half.flops) == (96 * 2**30, 2307e12 / 2)
    assert chips.CHIPS["v5e"].of_device() == chips.CHIPS["v5e"]


def described(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, jnp.dtype(leaf.dtype).name), tree)


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("text", "label", "sdxl")]


@pytest.mark.parametrize("kind", ["autoencoder", *SLOW])
def test_a_plan_has_the_shapes_of_the_run(kind, tmp_path):
    large = kind == "sdxl"
    config = (
        model_folders.smaller(config_of("sdxl_finetune"), kind) if large else tiny.config_of(kind)
    )
    run = build.run(config, tmp_path)
    first_stage = tiny.autoencoder() if kind == "text" else None
    if first_stage is not None:
        config.codec.run = "nowhere"
    of = plan.plan(config, first_stage)
    assert described(of.trained) == described(jax.eval_shape(run.init, jax.random.key(0)))
    assert described(of.frozen) == described(run.frozen)
    batch = next(run.batches(0))
    assert described(of.fields) == described(jax.tree.map(lambda a: a[0], batch))
    mesh = sharding.make_mesh(data=4, fsdp=2)
    for what in plan.WHAT[: 1 if kind == "autoencoder" else 2]:
        program = plan.program(config, of, mesh, what, 16)
        out = jax.eval_shape(program.call, *program.inputs.values())
        if what == "train":
            assert out[1]["loss"].shape == ()
            assert described(out[0].params) == described(of.trained)
        else:
            assert out.shape == (16, *of.fields["x"].shape)


class Seen(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pixels", "label"])
def test_what_is_compiled_ahead_is_what_a_run_compiles(kind, tmp_path, monkeypatch):
    """To the letter, by which JAX's cache of compiled programs knows it; nothing is compiled here."""
    lowered = compiled.lowered

    def noted(*given):
        raise Seen(lowered(*given)[0].as_text())

    monkeypatch.setattr(compiled, "lowered", noted)
    config = tiny.config_of(kind)
    first_stage = tiny.autoencoder() if kind == "label" else None
    run = build.run(config, tmp_path)
    program = plan.program(config, plan.plan(config, first_stage), run.mesh, "train", run.batch)
    with pytest.raises(Seen) as ahead:
        study.compile_program(program, run.mesh)
    with pytest.raises(Seen) as at_last:
        loop.train(run, tmp_path)
    (ahead,), (at_last,) = ahead.value.args, at_last.value.args
    assert "jit_train_step" in ahead
    assert ahead == at_last


def test_what_cannot_be_planned_is_named(tmp_path):
    config = tiny.config_of("unconditional")
    of, mesh = plan.plan(config), sharding.make_mesh(data=2, space=4)
    with pytest.raises(ValueError, match="a batch of 3 does not divide"):
        plan.program(config, of, mesh, "train", 3)
    with pytest.raises(ValueError, match="an autoencoder has no sampler"):
        plan.program(config, plan.plan(tiny.config_of("autoencoder")), mesh, "sample", 8)
    config.codec.run = str(tmp_path)
    with pytest.raises(FileNotFoundError, match="--first_stage"):
        plan.plan(config)
    with pytest.raises(ValueError, match="no config of an autoencoder"):
        plan.plan(config, tiny.unconditional())
    config.data.size = 20
    odd = plan.plan(config, tiny.autoencoder())
    with pytest.raises(ValueError, match="does not divide over space = 8"):
        plan.program(config, odd, sharding.make_mesh(data=1, space=8), "train", 8)


def compile_for(topology, *more):
    """The arguments of `ldm_jax.compile` for a tiny U-Net."""
    return [
        *("--config", f"{tiny.__file__}:unconditional", "--topology", topology),
        *("--first_stage", f"{tiny.__file__}:autoencoder", *more),
    ]


def refuse(given, monkeypatch):
    """Calls `ldm_jax.compile`, whose flags no other call has set, and sees it end with status 2."""
    from ldm_jax import cli
    from ldm_jax import compile as entry

    for name in entry.FLAGS:
        entry.FLAGS[name].unparse()
    argv = ["compile", *given]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as caught:
        entry.main(cli.parse(entry.FLAGS, argv))
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("topology", "words"),
    [
        ("h100:8", "programs for GPUs can only be compiled where such a GPU is"),
        ("v9:2x2", "v5e:2x2|2x4"),
        ("v5litepod-16", "these are known"),
        ("v5e:2x2", "libtpu, which compiles for TPUs, is not installed"),
    ],
)
def test_a_topology_that_cannot_be_compiled_for_is_named(topology, words, capsys, monkeypatch):
    find = chips.importlib.util.find_spec
    monkeypatch.setattr(
        chips.importlib.util, "find_spec", lambda name: None if name == "libtpu" else find(name)
    )
    refuse(compile_for(topology), monkeypatch)
    assert words in sentence(capsys)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("batch,layouts", "--search=layouts is unknown"),
        ("remat", "name batch too"),
        ("batch --nocode", "leave out --nocode"),
    ],
)
def test_a_search_that_cannot_be_is_named(given, words, capsys, monkeypatch):
    refuse(compile_for("v5e:2x2", *f"--search={given}".split()), monkeypatch)
    assert words in sentence(capsys)


@pytest.mark.slow
def test_a_run_is_foreseen_in_every_layout(monkeypatch):
    monkeypatch.setattr(variants, "REMATS", (False, True))  # the others take as long
    config = tiny.config_of("pixels")
    ways = variants.variants(config, None, jax.devices(), ("remat", "layout"))
    assert len(ways) == len(variants.REMATS) * len(variants.LAYOUTS)
    assert len({way.name for way in ways}) == len(ways)
    assert ways[0].mesh.shape["data"] == ways[-1].mesh.shape["fsdp"] == 8
    some = [ways[0], ways[1], ways[2], ways[-3]]
    plain, zero1, fsdp, again = variants.choices(some, "train", chips.CHIPS["v5e"])
    assert plain.temporary(64) > 1.3 * again.temporary(64) > 0  # what is computed again is not kept
    assert again.seconds(1000) > plain.seconds(1000)
    # Of so small a network little is split; what is, is moments first, then parameters.
    assert plain.inputs(8) >= zero1.inputs(8) >= fsdp.inputs(8)


@pytest.mark.slow
def test_a_step_is_compiled_for_a_slice_that_is_not_there(tmp_path):
    pytest.importorskip("libtpu", reason="compiling ahead for TPUs needs `pip install libtpu`")
    out = tmp_path / "figures.json"
    argv = compile_for("v5e:2x2", "--batch=2", f"--out={out}")
    done = subprocess.run(
        [sys.executable, "-m", "ldm_jax.compile", *argv],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tiny.ROOT), *sys.path])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["devices"] == 4
    assert set(found["collectives"]) == {"all-reduce"}  # data parallel
    assert found["collectives"]["all-reduce"]["count"] <= 5
    memory = found["memory"]
    assert memory["inputs"]["optimizer"] > 2 * memory["inputs"]["average"] > 0
    assert sum(memory["foreseen"].values()) == pytest.approx(
        memory["peak"], rel=0.4
    )  # code counts in so small a one
    assert sum(memory["inputs"].values()) <= memory["inputs_by_xla"] < memory["peak"] < memory["of"]
    assert 0 < found["mfu_bound"] < 1
    wrong = compile_for("v5e:3x5")
    argv = [sys.executable, "-m", "ldm_jax.compile", *wrong]
    done = subprocess.run(
        argv,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tiny.ROOT), *sys.path])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "--topology=v5e:3x5" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


REPORT = """Memory Space: default (color=0)
Total bytes: 7722099200 (7.19GiB)
Memory Space: vmem (color=1)
Total bytes: 117440512 (112.00MiB)
"""


def test_what_xla_has_written_is_read_once_it_is_whole(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    settled.ask(tmp_path)
    given, *ours = os.environ["XLA_FLAGS"].split()
    assert given.endswith("=8")
    assert f"--xla_dump_to={tmp_path}" in ours
    assert settled.text(tmp_path) is settled.settled(tmp_path) is None
    for name in ("0001.jit_multiply", "0002.jit_train_step"):
        program = tmp_path / f"module_{name}.after_optimizations.txt"
        program.write_text(name)
    memory = tmp_path / "module_0002.jit_train_step.after_optimizations-memory-usage-report.txt"
    memory.write_text(REPORT)
    assert settled.text(tmp_path) == "0002.jit_train_step"
    assert settled.settled(tmp_path) is None  # it may grow still
    monkeypatch.setattr(settled, "QUIET", 0.0)
    assert settled.settled(tmp_path) == ("0002.jit_train_step", 7722099200)
    memory.write_text("Total: 7 GB")
    with pytest.raises(ValueError, match="does not tell the bytes of HBM"):
        settled.settled(tmp_path)


def test_a_compilation_ends_when_enough_is_known():
    mesh = sharding.make_mesh()
    program = product(mesh)
    slow = SimpleNamespace(compile=lambda **_: time.sleep(2))
    told, spent = study.compile_program(program._replace(lower=lambda: slow), mesh, lambda: "known")
    assert told == "known"
    assert spent.wall < 2
    # What goes wrong within the thread is not lost.
    wrong = SimpleNamespace(compile=lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        study.compile_program(program._replace(lower=lambda: wrong), mesh)


def test_asynchronous_operations_are_read_in_both_ways_of_writing():
    """As jax writes them, and as XLA does: by a computation of their own."""
    whole, part = "f32[512,512]{1,0:T(8,128)}", "f32[128,512]{1,0:T(8,128)S(1)}"
    shape = f"(({whole}), {part}, s32[]{{:S(2)}})"
    start = f"  %slice-start.1 = {shape}"
    main = f"ENTRY %main (p: f32[512,512]) -> f32[128,512] {{\n  %p = {whole} parameter(0)\n"

    def done(kind):
        return f"  ROOT %slice-done.1 = {part} {kind}(%slice-start.1)\n}}\n"

    by_jax = main + f"{start} slice-start(%p), slice={{[0:128], [0:512]}}\n" + done("slice-done")
    by_xla = (
        f"%async (x: f32[512,512]) -> f32[128,512] {{\n  %x = {whole} parameter(0)\n"
        f"  ROOT %slice.1 = {part} slice(%x), slice={{[0:128], [0:512]}}\n}}\n"
        + main
        + f"{start} async-start(%p), calls=%async\n"
        + done("async-done")
    )
    # The part is read from HBM, into the chip's own memory.
    assert program_text.traffic(by_jax) == program_text.traffic(by_xla) == 128 * 512 * 4


def test_a_collective_that_goes_on_in_several_fusions_counts_once():
    part, whole, own = "bf16[16,64]{1,0}", "bf16[64,64]{1,0}", "f32[8,8]{1,0}"

    def fused(n, chain):
        return (
            f"%async_collective_fusion.{n} (a: bf16[16,64], b: f32[8,8]) -> (bf16[64,64], f32[8,8]) {{\n"
            f"  %a.{n} = {part} parameter(0)\n  %b.{n} = {own} parameter(1)\n"
            f"  %all-gather.{n} = {whole} all-gather(%a.{n}), channel_id=9, replica_groups=[1,4]<=[4], "
            f'dimensions={{0}}, frontend_attributes={{chain_id="{chain}"}}\n'
            f"  ROOT %t.{n} = ({whole}, {own}) tuple(%all-gather.{n}, %b.{n})\n}}\n"
        )

    def program(*chains):
        lines = [
            f"  %x = {part} parameter(0)\n  %y = {own} parameter(1)\n  %z = {whole} parameter(2)\n"
        ]
        for n, _ in enumerate(chains):
            given = "%x, %y" if n == 0 else "%z, %y"
            lines.append(
                f"  %f.{n} = ({whole}, {own}) fusion({given}), kind=kCustom, calls=%async_collective_fusion.{n}\n"
            )
        head = "ENTRY %main (x: bf16[16,64], y: f32[8,8], z: bf16[64,64]) -> () {\n"
        return "".join(fused(n, c) for n, c in enumerate(chains)) + head + "".join(lines) + "}\n"

    gathered, small, given = 64 * 64 * 2, 8 * 8 * 4, 16 * 64 * 2
    assert collectives.read(program(1, 1, 1)) == [("all-gather", gathered)]
    assert collectives.read(program(1, 1, 2)) == [("all-gather", gathered)] * 2
    # The gathered array is written once; what the fusions do beside it is counted in each.
    assert program_text.traffic(program(1, 1, 1)) == given + gathered + 3 * 2 * small
