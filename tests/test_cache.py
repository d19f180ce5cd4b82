"""The cache of latents: what is written, by how many processes and how often, and that training cannot tell."""

import dataclasses
import functools
import importlib
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from ldm_jax import build, cache, codec
from ldm_jax.build import buckets, diffusion, encoding, parts
from ldm_jax.data import latents, records
from ldm_jax.training import loop, sharding
from tests import model_folders, tiny
from tests.tiny import quick_compiles  # noqa: F401 (a fixture of this module)


def flipped(kind="text", **data):
    config = tiny.config_of(kind)
    config.data.update(dict(flip=True) | data)
    config.log.batches = 2
    return config


def write(config, out, split="train", shard=20, dtype="float32", rows=16, **processes):
    job = encoding.job(config, out, split, shard, dtype, rows)
    cache.write(job, out, split, **processes)
    return job


@functools.cache
def shared_cache(kind="text"):
    out = tiny.scratch() / f"cache_{kind}"
    for split in parts.SPLITS:
        write(flipped(kind), out, split)
    return out


@pytest.mark.parametrize("kind", ["text", "label"])
def test_what_a_step_sees_is_what_it_sees_of_pictures(kind):
    """Latents, with the noise of the step's key, and all fields; mirrored, in the second epoch (six steps are one)."""
    seen = []
    for data in (dict(), dict(cached=str(shared_cache(kind)))):
        config = flipped(kind, **data)
        source, mesh = parts.training(config), sharding.make_mesh(devices=jax.devices()[:1])
        coder, arrays, _ = diffusion.codec_of(config, mesh, None)
        if data:
            coder = codec.from_moments(coder, source.plan.posterior)
        fields = () if kind == "text" else ("label",)
        batches, encode = parts.batches(config, source, fields), jax.jit(coder.encode)
        of_steps = [batches[step] for step in (0, 1, 7, 12)]
        z = [encode(arrays, b["x"], jax.random.key(i)) for i, b in enumerate(of_steps)]
        rest = [{k: v for k, v in b.items() if k != "x"} for b in of_steps]
        seen.append((z, rest, [batches.captions(i) for i in (0, 7)] if kind == "text" else None))
    (z, rest, captions), (z_cached, rest_cached, captions_cached) = seen
    np.testing.assert_allclose(z_cached, z, rtol=1e-5, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, rest, rest_cached)
    assert captions == captions_cached
    assert not np.allclose(z[0], z[1])


@pytest.mark.slow
def test_training_from_the_cache_is_training_from_pictures(tmp_path):
    """The commands that a user types, mirror images and dropped captions included; six steps are an epoch."""
    pictures, cached, out = (str(tmp_path / name) for name in ("pictures", "cached", "cache"))

    def call(script, *argv):
        assert tiny.call(script, *argv, "--config.data.flip=True") == 0

    given = tiny.arguments("text", pictures, "--config.steps=7")
    call("train", *given)
    given[given.index("--workdir")] = "--out"
    given[given.index(pictures)] = out
    call("ldm_jax/cache", *given, "--shard=20", "--batch=16")
    call(
        "train", *tiny.arguments("text", cached, "--config.steps=7", f"--config.data.cached={out}")
    )
    one, other = (tiny.losses(Path(workdir)) for workdir in (pictures, cached))
    assert len(one) == len(other) == 7
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for name in ("loss", "grad_norm"):
            np.testing.assert_allclose(a[name], b[name], rtol=1e-4, err_msg=f"{name} {a['step']}")
    scales = [json.loads(Path(w, "codec.json").read_text())["scale"] for w in (pictures, cached)]
    np.testing.assert_allclose(*scales, rtol=1e-6)
    # Samples and reconstructions are those of the whole autoencoder; pictures are read where they lie.
    argv = ["--workdir", cached, "--prompt", "a red square", "--steps", 1]
    assert tiny.call("sample", *argv) == 0
    pipe = build.pipeline(cached)
    real, captions = build.examples(cached, "all", 8)
    assert real.shape == pipe.reconstruct(real).shape == (8, 16, 16, 3)
    assert len(captions) == 8
    # The cache may move, and the same command goes on with it.
    moved = Path(out).rename(tmp_path / "moved")
    argv = ("--config.steps=8", f"--config.data.cached={moved}")
    call("train", *tiny.arguments("text", cached, *argv))
    assert [line["step"] for line in tiny.losses(Path(cached))][-1] == 8


def test_every_epoch_samples_anew_and_mirrors(tmp_path):
    config = flipped(cached=str(shared_cache()))
    source = parts.training(config)
    batches = parts.batches(config, source, ())
    pictures = parts.batches(flipped(), parts.source(flipped()), ())
    assert source.plan.flips == 2
    sides = []
    for step in range(12):
        for x, record in zip(batches[step]["x"], batches.records(step), strict=True):
            found = [i for i in (0, 1) if np.array_equal(x, record["moments"][i])]
            assert found
            sides += found if len(found) == 1 else []  # some pictures are their own mirror image
    assert 0.2 < np.mean(sides) < 0.8
    assert batches.captions(9) == pictures.captions(9)
    straight = parts.batches(config, source, (), flip=False)
    for x, record in zip(straight[0]["x"], straight.records(0), strict=True):
        np.testing.assert_array_equal(x, record["moments"][0])


def test_a_cache_is_written_by_several_processes_and_in_several_goes(tmp_path, monkeypatch):
    whole = latents.cached(shared_cache(), "train")
    config = flipped()
    write(config, tmp_path, processes=2, process=1)
    with pytest.raises(FileNotFoundError, match=r"2 of the 3 files .*train-00000-of-00003"):
        latents.cached(tmp_path, "train")
    # Killed in the middle of the second of its two shards.
    killed = write_shard_killed(monkeypatch, at=2)
    with pytest.raises(KeyboardInterrupt):
        write(config, tmp_path, processes=2, process=0)
    assert killed == [tmp_path / "train-00002-of-00003.array_record"]
    monkeypatch.undo()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.array_record")}
    assert len(before) == 2
    write(config, tmp_path)  # whoever comes writes what is missing
    assert {path: path.stat().st_mtime_ns for path in before} == before
    again = latents.cached(tmp_path, "train")
    assert again.fingerprint == whole.fingerprint
    assert list(again.captions()) == list(whole.captions()) == list(parts.source(config).captions())
    for i in range(len(whole)):
        one, other = whole[i], again[i]
        assert one.keys() == other.keys()
        assert one["caption"] == other["caption"]
        np.testing.assert_allclose(one["moments"], other["moments"], atol=1e-6)


def write_shard_killed(monkeypatch, at):
    """From now on a shard's writing is cut short before its `at`-th record; the list of those that were."""
    killed, write_shard = [], latents.write_shard

    def writes(path, rows):
        def until():
            for i, row in enumerate(rows):
                if path.name.startswith("train-00002") and i == at:
                    killed.append(path)
                    raise KeyboardInterrupt
                yield row

        write_shard(path, until())

    monkeypatch.setattr(latents, "write_shard", writes)
    return killed


def test_a_picture_that_cannot_be_read_is_the_next_one(tmp_path):
    folder = tiny.pictures(tmp_path / "pictures", n=24)
    (folder / "003.png").write_bytes(b"no picture")
    config = flipped()
    config.data.source.path = str(folder)
    config.data.source.split = "all"
    config.data.max_bad_rate = 0.5
    write(config, tmp_path / "cache")
    of = latents.cached(tmp_path / "cache", "train")
    np.testing.assert_array_equal(of[3]["moments"], of[4]["moments"])
    assert of[3]["caption"] == of[4]["caption"]
    config.data.max_bad_rate = 0.0
    source = parts.source(config)
    assert isinstance(source, records.Source)
    assert isinstance(of, records.Source)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(crop="random"), "cut in its centre; say --config.data.crop=center"),
        (dict(size=32), r"pictures of \(16, 16\), and data.size is \(32, 32\)"),
        (dict(cached="nowhere"), "there is no cache of the train split in 'nowhere'; write it"),
    ],
)
def test_a_config_that_does_not_fit_the_cache(changes, words, tmp_path):
    config = flipped(cached=str(shared_cache()))
    config.data.update(changes)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        build.run(config, tmp_path / "run")


def test_other_caches_and_configs_are_refused(tmp_path):
    config = flipped("text")
    write(config, tmp_path / "cache")
    unmirrored = flipped("text", flip=False)
    with pytest.raises(ValueError, match=r"holds another cache of the train split \(flips: 2"):
        encoding.job(unmirrored, tmp_path / "cache", "train", 20, "float32", 16)
    with pytest.raises(ValueError, match="give the config of stage 2"):
        encoding.job(tiny.config_of("autoencoder"), tmp_path, "train", 20, "float32", 16)
    pixels = tiny.config_of("unconditional")
    pixels.codec = dict(name="identity")
    with pytest.raises(ValueError, match="encodes nothing"):
        encoding.job(pixels, tmp_path / "pixels", "train", 20, "float32", 16)
    write(unmirrored, tmp_path / "unmirrored")
    with pytest.raises(ValueError, match="has no mirror images"):
        parts.training(flipped(cached=str(tmp_path / "unmirrored")))
    first = tiny.config_of("autoencoder")
    first.data.cached = "somewhere"
    with pytest.raises(ValueError, match="an autoencoder is trained on pictures"):
        build.run(first, tmp_path / "run")


def test_a_cache_of_another_autoencoder_is_refused(tmp_path):
    shutil.copytree(shared_cache(), tmp_path / "cache")
    plan = latents.read_plan(shared_cache(), "train")
    other = dataclasses.replace(plan, codec=plan.codec | {"sha256": "0" * 64})
    latents.write_plan(tmp_path / "cache", "train", other)
    config = flipped(cached=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="which is not the one of this config"):
        build.run(config, tmp_path / "run")


# --- in buckets

BUCKETS = ((16, 16), (12, 20), (20, 12))


@functools.cache
def shapes():
    """Pictures of three shapes, each of one colour, with captions; one of them cannot be read."""
    path, lines = tiny.scratch() / "cached_shapes", []
    path.mkdir()
    every = [
        size for size, n in {(40, 40): 11, (24, 40): 9, (44, 24): 10}.items() for _ in range(n)
    ]
    for i, (h, w) in enumerate(np.random.default_rng(0).permutation(every)):
        image = Image.new("RGB", (int(w), int(h)), (8 * i, 250 - 8 * i, 100))
        image.paste((20, 20, 200), (0, 0, int(w) // 2, int(h)))  # mirrored it is another
        image.save(path / f"{i:02d}.png")
        lines.append(
            json.dumps({"file_name": f"{i:02d}.png", "text": f"a {list('abc')[i % 3]} {i}"})
        )
    broken = next(
        i for i, (h, w) in enumerate(np.random.default_rng(0).permutation(every)) if h > w
    )
    whole = (path / f"{broken:02d}.png").read_bytes()
    (path / f"{broken:02d}.png").write_bytes(whole[:60])  # its header tells the size
    (path / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return path


def in_buckets(given=BUCKETS, **data):
    config = flipped("text", max_bad_rate=1.0, **data)
    config.data.source.update(path=str(shapes()), split="all")
    with config.ignore_type():
        config.data.buckets = given
    return config


@functools.cache
def bucketed_cache():
    out = tiny.scratch() / "cache_buckets"
    for split in parts.SPLITS:
        write(in_buckets(), out, split, shard=8)
    return out


def test_in_buckets_a_step_sees_what_it_sees_of_pictures():
    """Shapes, latents and captions of two epochs (three batches of eight), the broken picture's stand-in too."""
    seen, replaced = [], set()
    for data in (dict(), dict(cached=str(bucketed_cache()))):
        config = in_buckets(**data)
        source, mesh = parts.training(config), sharding.make_mesh(devices=jax.devices()[:1])
        coder, arrays, _ = diffusion.codec_of(config, mesh, None)
        if data:
            coder = codec.from_moments(coder, source.plan.posterior)
        made, encode = buckets.batches(config, source, ()), jax.jit(coder.encode)
        of_steps = [made[step] for step in range(7)]
        replaced |= {int(i) for out in of_steps for i in out["_bad"] if i >= 0}
        z = [
            np.asarray(encode(arrays, out["x"], jax.random.key(i)))
            for i, out in enumerate(of_steps)
        ]
        captions = [made.streams[b].captions(at) for b, at in map(made.place, range(7))]
        seen.append((z, captions, made.told()))
    (z, captions, told), (z_cached, captions_cached, told_cached) = seen
    assert {of.shape for of in z} == {(8, 8, 8, 2), (8, 6, 10, 2), (8, 10, 6, 2)}
    for a, b in zip(z, z_cached, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)
    assert captions == captions_cached
    assert told == told_cached
    assert len(replaced) == 1


def test_a_cache_in_buckets_lies_bucket_by_bucket():
    plan = latents.read_plan(bucketed_cache(), "train")
    assert plan.buckets == ((16, 16, 11), (12, 20, 9), (20, 12, 10))
    of = latents.cached(bucketed_cache(), "train")
    shapes = [of[i]["moments"].shape[1:3] for i in range(len(of))]
    assert shapes == [(8, 8)] * 11 + [(6, 10)] * 9 + [(10, 6)] * 10
    ours, theirs = list(of.captions()), list(parts.source(in_buckets()).captions())
    assert len(ours) == len(theirs) == 30
    assert len(set(theirs) - set(ours)) == 1  # the broken picture's
    assert not set(ours) - set(theirs)
    validation = latents.cached(bucketed_cache(), "validation")
    assert validation.plan.buckets == ()
    assert {validation[i]["moments"].shape for i in range(3)} == {(2, 8, 8, 4)}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (BUCKETS[:2], "and data.buckets says [(16, 16), (12, 20)]; write another cache"),
        (BUCKETS[::-1], "set data.buckets as it was for this one"),
        (dict(pixels=256, step=16), "and data.buckets says [(16, 16)]"),
        ((), "are in buckets, and data.buckets is not set"),
    ],
)
def test_other_buckets_than_those_of_the_cache_are_refused(given, words, tmp_path):
    config = in_buckets(given, cached=str(bucketed_cache()))
    with pytest.raises(ValueError, match=re.escape(words)):
        build.run(config, tmp_path)
    config = flipped(cached=str(shared_cache()))
    with config.ignore_type():
        config.data.buckets = BUCKETS
    with pytest.raises(ValueError, match=r"are of the buckets \[\] \(height, width\)"):
        build.run(config, tmp_path)


@pytest.mark.slow
def test_in_buckets_training_from_the_cache_is_training_from_pictures(tmp_path):
    """Every bucket is compiled before the first step, and the losses are the same."""
    runs = []
    for name, data in (("pictures", {}), ("cache", dict(cached=str(bucketed_cache())))):
        config = in_buckets(**data)
        config.steps = 7
        run = build.run(config, tmp_path / name)
        shapes = [batch["x"].shape for batch in run.shapes]
        sides = [(8, 8), (6, 10), (10, 6)] if data else BUCKETS
        assert [shape[1:3] for shape in shapes] == list(sides)
        loop.train(run, tmp_path / name)
        runs.append(tiny.losses(tmp_path / name))
    assert len(runs[0]) == len(runs[1]) == 7
    for a, b in zip(*runs, strict=True):
        for key in ("loss", "grad_norm"):
            np.testing.assert_allclose(b[key], a[key], rtol=1e-4, err_msg=f"{key} {a['step']}")


def fine_tuning(kind, **data):
    config = importlib.import_module(f"configs.{kind}_finetune").get_config()
    config = model_folders.smaller(config, kind)
    config.data.update(dict(crop="center", flip=True, cached="") | data)
    return config


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_fine_tuning_from_the_cache_reads_what_the_text_encoders_made(kind, tmp_path):
    """First losses and gradients; every caption dropped in turn, and of XL the sizes of mirrored pictures."""
    for split in parts.SPLITS:
        write(fine_tuning(kind), tmp_path / "cache", split)
    runs = []
    for data in (dict(), dict(cached=str(tmp_path / "cache"))):
        config = fine_tuning(kind, **data)
        config.objective.drop = 0.5
        run = build.run(config, tmp_path / ("cached" if data else "pictures"))
        shapes = jax.eval_shape(run.init, jax.random.key(0))
        params = run.load(sharding.layouts(run.mesh, run.rules, shapes))
        grad = jax.jit(jax.value_and_grad(run.loss, has_aux=True))
        steps = [
            sharding.place(run.mesh, b) for b, _ in zip(run.batches(0), range(2), strict=False)
        ]
        runs.append(
            [grad(params, run.frozen, b, jax.random.key(i), i) for i, b in enumerate(steps)]
        )
    assert {"tokens_states", "tokens_pooled"} <= set(steps[0])
    for a, b in zip(jax.tree.leaves(runs[0]), jax.tree.leaves(runs[1]), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_captions_encoded_by_others_are_refused(tmp_path):
    for split in parts.SPLITS:
        write(fine_tuning("sd15"), tmp_path / "cache", split)
    config = fine_tuning("sd15", cached=str(tmp_path / "cache"))
    plan = json.loads((tmp_path / "cache/train.json").read_text())
    (tmp_path / "cache/train.json").write_text(json.dumps(plan | {"text": "0" * 64}))
    with pytest.raises(ValueError, match="encoded by other text encoders"):
        build.run(config, tmp_path / "run")
    config.init.train_text_encoder = True  # then captions are read
    assert "tokens_states" not in next(build.run(config, tmp_path / "run").batches(0))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--process_id=2", "--num_processes=2"], "is none of 2 processes, which count from 0"),
        (["--config.data.crop=random"], "say --config.data.crop=center"),
        (["--config.codec.run=nowhere"], "nowhere holds no run"),
        (["stray"], "unknown arguments ['stray']"),
    ],
)
def test_commands_that_write_no_cache(argv, words, tmp_path, capsys):
    given = tiny.arguments("text", "unused")
    given = [v for i, v in enumerate(given) if "--workdir" not in given[max(i - 1, 0) : i + 1]]
    assert tiny.call("ldm_jax/cache", *given, "--out", tmp_path / "cache", *argv) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()
