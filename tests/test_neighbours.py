"""Neighbours: the exact search, the index, the source that reads it, and the conditioner of their embeddings."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import conditioners
from ldm_jax.build import conditioner
from ldm_jax.data import neighbours, pipeline, records, tfds_source, transforms
from ldm_jax.quality import embedding, pictures
from tests import tiny


def vectors(n=40, d=6, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


@pytest.mark.parametrize("at_once", [7, 1024])
def test_the_search_is_exact_and_nobody_is_his_own_neighbour(at_once):
    of = vectors()
    found = neighbours.nearest(of, 5, at_once=at_once)
    for i, row in enumerate(found):
        others = [j for j in range(len(of)) if j != i]
        wanted = sorted(others, key=lambda j: -float(of[i] @ of[j]))[:5]
        assert row.tolist() == wanted
    with pytest.raises(ValueError, match=r"40 neighbours of 40 pictures: .* 1 to 39"):
        neighbours.nearest(of, 40)


@pytest.mark.parametrize("at_once", [7, 1024])
def test_only_the_database_has_neighbours(at_once):
    of, known = vectors(), 25
    found = neighbours.nearest(of, 3, known, at_once)
    assert found.max() < known
    for i, row in enumerate(found):
        others = [j for j in range(known) if j != i]
        assert row.tolist() == sorted(others, key=lambda j: -float(of[i] @ of[j]))[:3]
    with pytest.raises(ValueError, match=r"25 neighbours of 25 pictures: .* 1 to 24"):
        neighbours.nearest(of, 25, known)


def test_a_new_picture_is_looked_up_in_the_database(tmp_path):
    of = vectors()
    neighbours.write(tmp_path / "index.npz", [str(i) for i in range(40)], of, 3, 25, "a network")
    index = neighbours.read(tmp_path / "index.npz")
    assert (index.database, index.network) == (25, "a network")
    np.testing.assert_array_equal(
        neighbours.look_up(index, 5 * of[30:33], 3), index.vectors[index.near[30:33]]
    )
    with pytest.raises(ValueError, match="vectors of 6 numbers, and these pictures have 5"):
        neighbours.look_up(index, of[:1, :5], 3)
    with pytest.raises(ValueError, match="has 25 pictures, and 26 neighbours are asked for"):
        neighbours.look_up(index, of[:1], 26)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    path = tmp_path_factory.mktemp("index") / "index.npz"
    names = sorted(file.name for file in tiny.shared_pictures().glob("*.png"))
    neighbours.write(path, names, 3 * vectors(len(names)), 4)
    return path


def test_a_picture_comes_with_its_neighbours_vectors(index):
    names, of, near, database, _ = neighbours.read(index)
    assert database == len(names)
    np.testing.assert_allclose(np.linalg.norm(of.astype(np.float32), axis=1), 1, atol=1e-3)
    part = neighbours.folder(tiny.shared_pictures(), index, neighbours=3, split="train")
    assert isinstance(part, records.Source)
    assert len(part) < len(names)
    i = names.index(part.of.files[2])
    np.testing.assert_array_equal(part[2]["neighbours"], of[near[i, :3]].astype(np.float32))
    files = [tiny.shared_pictures() / names[j] for j in near[i, :3]]
    assert part.made_of(2) == [file.read_bytes() for file in files]
    batch = pipeline.batches(part, batch=4, size=8, seed=0, fields=("neighbours",))[0]
    assert batch["neighbours"].shape == (4, 3, 6)
    batch = {"neighbours": jnp.asarray(batch["neighbours"])}
    cond = conditioners.Tokens("neighbours", count=3, width=6).apply({}, batch)
    np.testing.assert_array_equal(cond.tokens, batch["neighbours"])
    null = conditioners.Tokens("neighbours", count=3, width=6).apply(
        {}, batch, conditioners.drop_all(["neighbours"], 4)
    )
    np.testing.assert_array_equal(null.tokens, 0)
    more = conditioners.Tokens("neighbours", count=3, width=6, scale=2.0, pool=True)
    cond = more.apply({}, batch)
    np.testing.assert_array_equal(cond.tokens, 2 * batch["neighbours"])
    np.testing.assert_allclose(cond.vector, 2 * batch["neighbours"].mean(1), rtol=1e-6)
    null = more.apply({}, batch, conditioners.drop_all(["neighbours"], 4))
    np.testing.assert_array_equal(null.vector, 0)
    with pytest.raises(ValueError, match="3 tokens of width 6 and the conditioner reads 2 of 6"):
        conditioners.Tokens("neighbours", count=2, width=6).apply({}, batch)


def test_an_index_that_does_not_fit(index, tmp_path):
    with pytest.raises(ValueError, match=r"has 4 neighbours of each picture, not 5; .* --k 5"):
        neighbours.folder(tiny.shared_pictures(), index, neighbours=5)
    with pytest.raises(FileNotFoundError, match="there is no index"):
        neighbours.folder(tiny.shared_pictures(), tmp_path / "none.npz", neighbours=1)
    names, of, *_ = neighbours.read(index)
    neighbours.write(tmp_path / "less.npz", names[1:], of[1:], 4)
    with pytest.raises(ValueError, match=r"lacks 1 of the 48 pictures .* '000\.png'"):
        neighbours.folder(tiny.shared_pictures(), tmp_path / "less.npz", neighbours=1)
    np.savez(tmp_path / "other.npz", a=np.zeros(1))
    with pytest.raises(ValueError, match="is no index of neighbours"):
        neighbours.read(tmp_path / "other.npz")


def test_the_shape_of_embeddings_is_the_conditioner_s():
    config = importlib.import_module("configs.retrieval_768").get_config()
    assert conditioner.example(config, ("neighbours",), {})["neighbours"].shape == (1, 20, 768)


def call(monkeypatch, *flags):
    from ldm_jax import cli
    from ldm_jax import neighbours as command

    monkeypatch.setattr(jax.config, "update", lambda *_: None)  # of the compile cache
    command.FLAGS.unparse_flags()
    for name in command.FLAGS:
        command.FLAGS[name].value = command.FLAGS[name].default
    command.main(cli.parse(command.FLAGS, ["neighbours", *map(str, flags)]))


def means(of):
    return np.stack([of.read(i).mean((0, 1)) for i in range(of.count)])


def test_the_command_writes_the_index_of_a_folder(monkeypatch, tmp_path, capsys):
    def of_clip(folder):
        assert folder == "model"
        return embedding.Embedding("means", None, means)

    monkeypatch.setattr(embedding, "of_clip", of_clip)
    out = tmp_path / "index.npz"
    flags = ("--images", tiny.shared_pictures(), "--clip", "model", "--out", out)
    call(monkeypatch, *flags, "--k", "6", "--size", "8")
    index = neighbours.read(out)
    assert index.near.shape == (48, 6)
    assert {int(i) % 3 for i in index.near[0]} == {0}  # pictures of the same colour
    assert index.network == "means"
    assert capsys.readouterr().out.strip() == str(out)
    for more, words in (
        (("--k", "48"), "--k from 1 to 47"),
        (("--also", "validation"), "a folder has none"),
        (("--features", "shapes:F"), "name one network"),
        (("--dataset", "shapes/simple"), "give either --images"),
    ):
        with pytest.raises(SystemExit):
            call(monkeypatch, *flags, *more)
        assert words in capsys.readouterr().err


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A few pictures of `shapes`, prepared."""
    return tiny.simple_shapes(tmp_path_factory.mktemp("data"), train=40, validation=8)


def test_the_command_writes_the_index_of_a_prepared_data_set(few, monkeypatch, tmp_path, capsys):
    """By a feature network, whose vectors are those of the index; and its source has both splits."""
    out, features = tmp_path / "index.npz", tiny.shared_features()
    flags = ("--dataset", "shapes/simple", "--data_dir", few, "--features", features)
    call(monkeypatch, *flags, "--also", "validation", "--k", "3", "--out", out)
    index = neighbours.read(out)
    assert index.database == 40
    assert index.near.max() < 40
    assert (index.names[0], index.names[-1]) == ("train/0", "validation/7")
    by = embedding.named(None, features)
    assert index.network == by.network

    part = neighbours.tfds("shapes/simple", few, out, split="validation", neighbours=2)
    own = by.embed(pictures.of_source(part, "pictures"))
    np.testing.assert_allclose(index.vectors[40:], neighbours.unit(own), atol=2e-3)
    np.testing.assert_array_equal(
        part[5]["neighbours"], index.vectors[index.near[45, :2]].astype(np.float32)
    )
    train = tfds_source.tfds("shapes/simple", few, "train")
    wanted = [train[int(i)]["image"] for i in index.near[45, :2]]
    assert part.made_of(5) == wanted
    assert isinstance(part, records.Source)
    only = part.only(("image", "neighbours"))
    assert set(only[0]) == {"image", "neighbours"}
    assert transforms.decode(only[0]["image"]).size == (32, 32)
    later = neighbours.tfds("shapes/simple", few, out, split="train[30:]", neighbours=2)
    np.testing.assert_array_equal(
        later[1]["neighbours"], index.vectors[index.near[31, :2]].astype(np.float32)
    )

    with pytest.raises(SystemExit):
        call(monkeypatch, *flags, "--also", "train[:3]", "--k", "3", "--out", out)
    assert "overlap" in capsys.readouterr().err
    call(monkeypatch, *flags, "--split", "train[:20]", "--k", "3", "--out", out)
    with pytest.raises(ValueError, match=r"lacks 20 of the 40 pictures .* 'train/20'"):
        neighbours.tfds("shapes/simple", few, out, neighbours=2)
