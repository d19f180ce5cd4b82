"""Compiled steps that are kept: the same bits without a trace, and nothing that is stale or damaged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.training import compiled, sharding


@pytest.fixture
def cache(tmp_path, monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    yield tmp_path / compiled.OF_STEPS
    jax.config.update("jax_compilation_cache_dir", before)


def step(state, frozen, batch, rng):
    noise = jax.random.normal(jax.random.fold_in(rng, state["step"]), batch["x"].shape)
    w = state["w"] - 0.1 * (frozen["a"] * batch["x"] + noise).mean(0)
    return {"step": state["step"] + 1, "w": w}, {"loss": (w**2).sum(), "a": frozen["a"]}


def no_step(*_):
    raise AssertionError("the step was traced")


def start(width=3):
    mesh = sharding.make_mesh()
    everywhere = sharding.replicated(mesh)
    state = {"step": jnp.int32(0), "w": jnp.arange(float(width))}
    state = jax.device_put(state, everywhere)
    inputs = (
        jax.device_put({"a": jnp.float32(2.0)}, everywhere),
        sharding.place(mesh, {"x": np.ones((8, width), np.float32)}),
        jax.device_put(jax.random.key(3), everywhere),
    )
    layouts = jax.tree.map(lambda _: everywhere, state)
    return (state, *inputs), (layouts, everywhere), list(mesh.devices.flat)


def walk(call, inputs, steps=3):
    state, metrics = inputs[0], []
    for _ in range(steps):
        state, told = call(state, *inputs[1:])
        metrics.append(told)
    return jax.tree.map(np.asarray, (state, metrics))


def test_a_kept_step_runs_without_a_trace_and_gives_the_same_bits(cache):
    inputs, layouts, devices = start()
    plain = walk(jax.jit(step), inputs)
    first = walk(compiled.finish(compiled.begin("key", devices), step, layouts, inputs), inputs)
    assert [p.name for p in cache.iterdir()] == ["key"]
    inputs, layouts, devices = start()  # the first ones were donated
    kept = compiled.begin("key", devices)
    again = walk(compiled.finish(kept, no_step, layouts, inputs), inputs)
    assert jax.tree.structure(again) == jax.tree.structure(plain)
    for a, b, c in zip(*map(jax.tree.leaves, (plain, first, again)), strict=True):
        assert b.tobytes() == c.tobytes()
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_a_damaged_file_is_told_and_made_anew(cache, caplog):
    inputs, layouts, devices = start()
    compiled.finish(compiled.begin("key", devices), step, layouts, inputs)
    file = cache / "key"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
    kept = compiled.begin("key", devices)
    call = compiled.finish(kept, step, layouts, inputs)
    assert "contents are damaged" in caplog.text
    assert walk(call, inputs)[0]["step"] == 3
    assert file.read_bytes() != bytes(content)


def test_other_inputs_under_the_same_digest_stop(cache):
    inputs, layouts, devices = start()
    compiled.finish(compiled.begin("key", devices), step, layouts, inputs)
    inputs, layouts, devices = start(width=4)
    with pytest.raises(RuntimeError, match="compiled for other inputs"):
        compiled.finish(compiled.begin("key", devices), step, layouts, inputs)


def test_nothing_is_kept_without_a_folder():
    inputs, layouts, devices = start()
    assert jax.config.jax_compilation_cache_dir is None
    kept = compiled.begin("key", devices)
    assert kept is None
    assert walk(compiled.finish(kept, step, layouts, inputs), inputs)[0]["step"] == 3


def test_the_oldest_go(cache, monkeypatch):
    monkeypatch.setattr(compiled, "KEPT", 2)
    for key in "abc":
        inputs, layouts, devices = start()
        compiled.finish(compiled.begin(key, devices), step, layouts, inputs)
    assert sorted(p.name for p in cache.iterdir()) == ["b", "c"]


def test_the_digest_follows_what_a_step_is_made_of(tmp_path, monkeypatch):
    config = tmp_path / "config.json"
    config.write_text("{}")
    devices = jax.devices()

    def digest(values=("a",), devices=devices):
        return compiled.digest(values, [config], devices)

    seen = [digest(), digest(("b",)), digest(devices=devices[:4])]
    config.write_text("{ }")
    seen.append(digest())
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=elsewhere")
    seen.append(digest())
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setattr(compiled.sys, "version", "4.0")
    seen.append(digest())
    assert len(set(seen)) == len(seen)
    assert digest() == seen[-1]
    with monkeypatch.context() as patched:
        patched.setattr(compiled, "PACKAGE", tmp_path)
        (tmp_path / "code.py").write_text("1")
        other = digest()
        (tmp_path / "code.py").write_text("2")
        assert len({other, digest(), seen[-1]}) == 3
