"""Neighbours: the exact search, the index, the source that reads it, and the conditioner of their embeddings."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import conditioners
from ldm_jax.build import conditioner
from ldm_jax.data import neighbours, pipeline, records
from ldm_jax.quality import clip_score
from tests import tiny


def vectors(n=40, d=6, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


@pytest.mark.parametrize("at_once", [7, 1024])
def test_the_search_is_exact_and_nobody_is_his_own_neighbour(at_once):
    of = vectors()
    found = neighbours.nearest(of, 5, at_once)
    for i, row in enumerate(found):
        others = [j for j in range(len(of)) if j != i]
        wanted = sorted(others, key=lambda j: -float(of[i] @ of[j]))[:5]
        assert row.tolist() == wanted
    with pytest.raises(ValueError, match=r"40 neighbours of each of 40 pictures: .* 1 to 39"):
        neighbours.nearest(of, 40)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    path = tmp_path_factory.mktemp("index") / "index.npz"
    names = sorted(file.name for file in tiny.shared_pictures().glob("*.png"))
    neighbours.write(path, names, 3 * vectors(len(names)), 4)
    return path


def test_a_picture_comes_with_its_neighbours_vectors(index):
    names, of, near = neighbours.read(index)
    np.testing.assert_allclose(np.linalg.norm(of.astype(np.float32), axis=1), 1, atol=1e-3)
    part = neighbours.folder(tiny.shared_pictures(), index, neighbours=3, split="train")
    assert isinstance(part, records.Source)
    assert len(part) < len(names)
    i = names.index(part.of.files[2])
    np.testing.assert_array_equal(part[2]["neighbours"], of[near[i, :3]].astype(np.float32))
    batch = pipeline.batches(part, batch=4, size=8, seed=0, fields=("neighbours",))[0]
    assert batch["neighbours"].shape == (4, 3, 6)
    batch = {"neighbours": jnp.asarray(batch["neighbours"])}
    cond = conditioners.Tokens("neighbours", count=3, width=6).apply({}, batch)
    np.testing.assert_array_equal(cond.tokens, batch["neighbours"])
    null = conditioners.Tokens("neighbours", count=3, width=6).apply(
        {}, batch, conditioners.drop_all(["neighbours"], 4)
    )
    np.testing.assert_array_equal(null.tokens, 0)
    with pytest.raises(ValueError, match="3 tokens of width 6 and the conditioner reads 2 of 6"):
        conditioners.Tokens("neighbours", count=2, width=6).apply({}, batch)


def test_an_index_that_does_not_fit(index, tmp_path):
    with pytest.raises(ValueError, match=r"has 4 neighbours of each picture, not 5; .* --k 5"):
        neighbours.folder(tiny.shared_pictures(), index, neighbours=5)
    with pytest.raises(FileNotFoundError, match="there is no index"):
        neighbours.folder(tiny.shared_pictures(), tmp_path / "none.npz", neighbours=1)
    names, of, _ = neighbours.read(index)
    neighbours.write(tmp_path / "less.npz", names[1:], of[1:], 4)
    with pytest.raises(ValueError, match=r"lacks 1 of the 48 pictures .* '000\.png'"):
        neighbours.folder(tiny.shared_pictures(), tmp_path / "less.npz", neighbours=1)
    np.savez(tmp_path / "other.npz", a=np.zeros(1))
    with pytest.raises(ValueError, match="is no index of neighbours"):
        neighbours.read(tmp_path / "other.npz")


def test_the_shape_of_embeddings_is_the_conditioner_s():
    config = importlib.import_module("configs.retrieval_768").get_config()
    assert conditioner.example(config, ("neighbours",), {})["neighbours"].shape == (1, 20, 768)


def test_the_command_writes_the_index(monkeypatch, tmp_path, capsys):
    from ldm_jax import cli
    from ldm_jax import neighbours as command

    def embedder(folder):
        assert folder == "model"
        return lambda of: np.stack([of.read(i).mean((0, 1)) for i in range(of.count)])

    monkeypatch.setattr(clip_score, "embedder", embedder)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)  # of the compile cache

    def call(*flags):
        flags = ("neighbours", "--images", str(tiny.shared_pictures()), "--clip", "model", *flags)
        command.main(cli.parse(command.FLAGS, list(flags)))

    call("--out", str(tmp_path / "index.npz"), "--k", "6", "--size", "8")
    _, _, near = neighbours.read(tmp_path / "index.npz")
    assert near.shape == (48, 6)
    assert {int(i) % 3 for i in near[0]} == {0}  # pictures of the same colour
    assert capsys.readouterr().out.strip() == str(tmp_path / "index.npz")
    with pytest.raises(SystemExit):
        call("--out", str(tmp_path / "index.npz"), "--k", "48")
    assert "--k from 1 to 47" in capsys.readouterr().err
