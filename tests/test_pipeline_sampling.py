"""Sampling: what a sample depends on, what compiles anew, and sample.py."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from ldm_jax import build, media, tasks
from tests import tiny
from tests.tiny import quick_compiles  # noqa: F401 (a fixture of this module)

pytestmark = pytest.mark.slow

RED, BLUE = "a red square", "a blue square"


@functools.cache
def model(kind="text"):
    """A pipeline whose parameters are random: fresh ones answer 0 to everything."""
    made = build.pipeline(tiny.shared_model(kind))
    leaves, treedef = jax.tree.flatten(made.params)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    shaken = [
        leaf + 0.2 * jax.random.normal(key, leaf.shape)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return dataclasses.replace(made, params=jax.tree.unflatten(treedef, shaken))


@functools.cache
def sampling(**override):
    return build.sampling(tiny.shared_model("text"), model(), **override)


@functools.cache
def with_film():
    return sampling(film=True, steps=10)


def draw(prompts, seeds, how=None, size=64):
    drawer = model().drawer(how or with_film(), size)
    parts = list(drawer(model().prompts(prompts), seeds))
    return np.concatenate([p.x for p in parts]), np.concatenate([p.film for p in parts], axis=1)


def test_a_sample_depends_on_its_seed_and_prompt_alone():
    alone, _ = draw([RED], [7])
    among, _ = draw([BLUE, RED, RED, BLUE], [1, 7, 8, 7])
    assert alone.shape == (1, 16, 16, 3)
    np.testing.assert_allclose(among[1], alone[0], atol=1e-5)
    assert np.abs(among[2] - alone[0]).max() > 1e-2  # another seed
    assert np.abs(among[3] - alone[0]).max() > 1e-4  # another prompt
    # Ten samples in two chunks of eight, the second of them filled up.
    many, _ = draw([RED] * 10, list(range(10)), size=8)
    assert len(many) == 10
    np.testing.assert_allclose(many[7], alone[0], atol=1e-5)
    np.testing.assert_allclose(many[9], draw([RED], [9])[0][0], atol=1e-5)


def test_seeds_prompts_and_guidance_do_not_compile_anew():
    how = with_film()
    sampler = tasks.make_sampler(model().model, model().shape, how)
    first, _ = draw([RED], [0], how)
    compiled = sampler._cache_size()
    stronger, _ = draw([BLUE], [1], dataclasses.replace(how, guidance=5.0))
    again, _ = draw([RED], [0], dataclasses.replace(how, guidance=5.0))
    assert tasks.make_sampler(model().model, model().shape, how) is sampler
    assert sampler._cache_size() == compiled
    assert np.abs(again - first).max() > 1e-4  # and the scale is not baked in
    assert np.isfinite(stronger).all()


def test_the_film_ends_at_the_sample():
    x, film = draw([RED, BLUE], [3, 4])
    assert film.shape == (tasks.FILM, 2, 16, 16, 3)
    np.testing.assert_allclose(film[-1], x, atol=1e-5)  # Euler's last step goes to its estimate
    distance = np.abs(film - x).mean((1, 2, 3, 4))
    assert distance[0] > distance[len(distance) // 2] > distance[-1]


def test_reconstructions_do_not_depend_on_their_chunks():
    x = np.random.default_rng(0).uniform(-1, 1, (8, 16, 16, 3)).astype(np.float32)
    rebuilt = model().reconstruct(x, size=8)
    assert rebuilt.shape == x.shape
    np.testing.assert_allclose(model().reconstruct(x[:8], size=8), rebuilt, atol=1e-5)


def test_the_model_is_known_by_its_hash():
    about = model().provenance(sampling())
    assert about["step"] == "0"
    assert len(about["model_sha256"]) == len(about["config_sha256"]) == 64
    fresh = build.pipeline(tiny.shared_model("text"))
    assert fresh.provenance(sampling())["model_sha256"] != about["model_sha256"]
    assert fresh.provenance(sampling()) == fresh.provenance(sampling())


def test_labels_are_names_or_numbers():
    of = model("label")
    assert of.classes == ("blue", "green", "red")
    np.testing.assert_array_equal(of.labels(["red", "0", "green"])["label"], [2, 0, 1])
    with pytest.raises(ValueError, match="classes are"):
        of.labels(["3"])


def test_prompts_come_from_flags_and_files(tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text(f"{RED}\n\n  {BLUE} \n")
    out = tmp_path / "out"
    status = tiny.call(
        "sample",
        *("--workdir", tiny.shared_model("text"), "--out", out, "--n", 2, "--seed", 5),
        *("--prompt", tmp_path / "prompts.txt", "--prompt", "a green square"),
        *("--solver", "ddim", "--steps", 2, "--guidance", 3.0, "--batch", 8),
        *("--negative", "a blue square", "--heatmaps"),
    )
    assert status == 0
    assert capsys.readouterr().out.strip() == str(out / "grid.png")
    assert sorted(p.name for p in out.iterdir()) == [
        *(f"{i:05d}{kind}.png" for i in range(6) for kind in ("", "_words")),
        "grid.png",
    ]
    texts = [media.read_png_text(out / f"{i:05d}.png") for i in range(6)]
    assert [t["prompt"] for t in texts] == [
        RED,
        RED,
        BLUE,
        BLUE,
        "a green square",
        "a green square",
    ]
    assert [t["seed"] for t in texts] == ["5", "6", "7", "8", "9", "10"]
    for text in texts:
        assert (text["solver"], text["steps"], text["guidance"]) == ("ddim", "2", "3.0")
        assert text["negative"] == "a blue square"
        assert text["workdir"] == str(tiny.shared_model("text"))
        assert text["software"] == "ldm_jax"
    (tmp_path / "empty.txt").write_text("\n")
    argv = ["--workdir", tiny.shared_model("text"), "--prompt", tmp_path / "empty.txt"]
    assert tiny.call("sample", *argv) == 2
    assert "holds no prompt" in capsys.readouterr().err


def test_labels_are_sampled(tmp_path):
    out = tmp_path / "out"
    argv = ["--workdir", tiny.shared_model("label"), "--out", out, "--label", "red", "--label", "1"]
    assert tiny.call("sample", *argv, "--steps", 1) == 0
    assert media.read_png(out / "00001.png").shape == (16, 16, 3)
    assert media.read_png_text(out / "00001.png")["prompt"] == "1"
    assert not (out / "00002.png").exists()


def test_a_real_process_draws_an_unconditional_model(tmp_path):
    workdir = tiny.shared_model("unconditional")
    done = tiny.spawn(
        tiny.ROOT / "sample.py", "--workdir", workdir, "--n", 3, "--film", "--out", tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "grid.png")
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"00000.png", "00001.png", "00002.png", "grid.png", "film.png"}
    text = media.read_png_text(tmp_path / "00002.png")
    assert (text["seed"], text["solver"], text["step"]) == ("2", "euler", "0")
    assert "prompt" not in text
    # Four frames of 16 pixels, eight times as large, in a row a sample.
    assert media.read_png(tmp_path / "film.png").shape[1] == 4 * (128 + 8) + 8
