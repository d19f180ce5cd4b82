"""The records of a cache: damaged ones, full disks, several captions, half the digits."""

import dataclasses
import functools
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import conditioners
from ldm_jax.data import examples, latents, transforms
from tests import tiny
from tests.test_cache import flipped, shared_cache, write
from tests.test_conditioners import BATCH, EMPTY, SECOND, apply, encoder, pair, run
from tests.tiny import quick_compiles  # noqa: F401 (a fixture of this module)


def test_a_damaged_record_is_named(tmp_path):
    write(flipped(), tmp_path)
    shard = tmp_path / "train-00001-of-00003.array_record"
    whole, words = shard.read_bytes(), "train-00001-of-00003.array_record is damaged .*; remove it"
    for at in (100, 3000, 65536):
        latents._open.cache_clear()
        shard.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(ValueError, match=words):
            list(map(latents.cached(tmp_path, "train").__getitem__, range(47)))
    latents._open.cache_clear()
    shard.write_bytes(whole)
    plan = latents.read_plan(tmp_path, "train")
    latents.write_plan(tmp_path, "train", dataclasses.replace(plan, records=46))
    with pytest.raises(ValueError, match="holds 47 records and not 46"):
        latents.cached(tmp_path, "train")
    latents.plan_path(tmp_path, "train").write_text('{"name": "half"')
    with pytest.raises(
        ValueError, match=r"train.json is no plan of a cache .*write the cache anew"
    ):
        latents.cached(tmp_path, "train")
    latents.write_plan(tmp_path, "train", plan)
    latents._open.cache_clear()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=words):
        latents.cached(tmp_path, "train")


def test_one_of_several_captions_is_chosen_with_its_encoding():
    record = {
        "moments": np.zeros((1, 2, 2, 4), np.float32),
        "caption": ["one", "two", "three"],
        "tokens_states": np.arange(3.0)[:, None, None] * np.ones((3, 5, 2)),
    }
    chosen = set()
    for seed in range(20):
        rng = np.random.default_rng(seed)
        example = latents.shown(record, ("tokens_states",), rng, flip=False)
        again = np.random.default_rng(seed)
        transforms.draws(again)
        assert example["caption"] == examples.one_caption(record, again)["caption"]
        place = record["caption"].index(example["caption"])
        assert (example["tokens_states"] == place).all()
        chosen.add(place)
    assert chosen == {0, 1, 2}


def test_a_full_disk_leaves_no_file_behind(tmp_path):
    code = f"""
        import resource
        from pathlib import Path
        import numpy as np
        from ldm_jax.data import latents
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        row = {{"moments": np.zeros((1, 64, 64, 8), np.float32), "caption": "a"}}
        try:
            latents.write_shard(Path({str(tmp_path)!r}, "train-00000-of-00001.array_record"), [row] * 20)
        except OSError as error:
            print(error)
    """
    done = tiny.spawn("-c", textwrap.dedent(code))
    assert "could not be written: write() failed: File too large" in done.stdout, done.stderr
    assert not list(tmp_path.glob("*.array_record"))


def test_half_the_digits_take_half_the_room(tmp_path):
    write(flipped(), tmp_path, "validation", dtype="float16")
    halves, whole = (latents.cached(p, "validation") for p in (tmp_path, shared_cache()))
    assert halves[0]["moments"].dtype == np.float16
    np.testing.assert_allclose(halves[0]["moments"], whole[0]["moments"], rtol=1e-3, atol=1e-3)
    example = latents.shown(halves[0], (), np.random.default_rng(0), flip=False)
    assert example["x"].dtype == np.float32
    assert halves.fingerprint != whole.fingerprint


@pytest.mark.parametrize("kind", ["one", "pair", "zeros"])
def test_prompts_that_were_encoded_are_the_same_condition(kind):
    """Without dropped rows, with one, and with all of them: the null condition."""
    of = {
        "one": lambda: conditioners.Clip(encoder(), EMPTY),
        "pair": pair,
        "zeros": lambda: pair(zero_null=True),
    }[kind]()
    _, params = run(of)
    made = jax.jit(functools.partial(of.apply, method="encoded"))(params, BATCH)
    texts = [field for field in of.fields if field != "sizes"]
    assert set(made) == {name for field in texts for name in conditioners.state_names(field)}
    # What is encoded is what is read: other ids beside it change nothing.
    batch = BATCH | {field: jnp.zeros_like(BATCH[field]) for field in texts} | made
    for rows in (None, SECOND, jnp.ones(3, bool)):
        drop = None if rows is None else dict.fromkeys(of.fields, rows)
        expected, found = apply(of, params, drop), apply(of, params, drop, batch)
        for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5)
