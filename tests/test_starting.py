"""Stage 2 from a published file of DiT: what the run's parameters are at step 0, and what does not fit."""

import jax
import numpy as np
import pytest

from ldm_jax import build
from ldm_jax.training import sharding
from ldm_jax.weights import dit as their
from ldm_jax.weights import files, table
from tests import tiny
from tests.drawn import like
from tests.tiny import assert_equal

CLASSES, CHANNELS, SIDE = 3, 3, 8


def config_of(path, **start):
    """A DiT on the pixels of three classes, from a file."""
    config = tiny.config_of("transformer")
    with config.ignore_type():
        config.codec = dict(name="identity")
        config.start = dict(weights="dit", path=str(path)) | start
    return config


def params_of(classes=CLASSES, **model):
    config = tiny.get_config("transformer").model.to_dict() | model
    config.pop("name")
    network = build.diffusion.parts.make_section("models", dict(name="dit.DiT", **config), "model")
    return network, like(their.shapes(network, classes, CHANNELS))


def written(path, **kind):
    """The authors' file, and the parameters in it."""
    _, params = params_of(**kind)
    tensors = their.with_positions(table.export(their.ORIGINAL, params), SIDE)
    files.write(path, tensors, {})
    return path, params


def begun(config, workdir):
    run = build.run(config, workdir)
    shapes = jax.eval_shape(run.init, jax.random.key(0))
    return run.load(jax.tree.map(lambda _: sharding.replicated(run.mesh), shapes))


def test_a_run_starts_from_the_authors_file(tmp_path):
    path, params = written(tmp_path / "DiT.safetensors")
    assert_equal(begun(config_of(path), tmp_path / "run"), params)


def test_a_run_starts_from_diffusers_file(tmp_path):
    network, params = params_of()
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    files.write(path, their.spread(table.export(their.DIFFUSERS, params), network.depth), {})
    assert_equal(begun(config_of(path), tmp_path / "run"), params)


def test_other_classes_are_drawn_anew_where_that_is_said(tmp_path):
    path, params = written(tmp_path / "DiT.safetensors", classes=7)
    with pytest.raises(ValueError, match=r"DiT\.safetensors: .*embedding_table.*\(8, 8\) instead"):
        build.run(config_of(path), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    found = begun(config_of(path, fresh_classes=True), tmp_path / "run")
    assert_equal(found["network"], params["network"])
    rows = np.asarray(found["conditioner"]["embedding"]["embedding"])
    assert rows.shape == (CLASSES + 1, 8)
    assert rows.std() > 0.01


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.start.update(path="none.pt"), "--config.start.path=..."),
        (lambda c: c.start.update(weights="dot"), "did you mean 'dit'"),
        (lambda c: c.model.update(depth=3), "tensors are missing"),
        (lambda c: c.model.update(name="unet.UNet", depth=1), "is for the model dit.DiT"),
        (lambda c: c.update(init=dict(weights="diffusers", path="a")), "contradict 'init'"),
    ],
)
def test_what_does_not_fit_is_told(change, words, tmp_path):
    config = config_of(written(tmp_path / "DiT.safetensors")[0])
    with config.ignore_type():
        change(config)
        if config.model.name == "unet.UNet":
            config.model = tiny.get_config("label").model
            del config.path, config.target, config.objective.bound
            config.update(path=dict(name="rectified_flow"), target=dict(name="flow"))
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        build.run(config, tmp_path / "run")
    assert words in str(caught.value)


def test_files_of_something_else(tmp_path):
    files.write(tmp_path / "other.safetensors", {"a.weight": np.ones(3, np.float32)}, {})
    with pytest.raises(ValueError, match=r"other\.safetensors: these 1 tensors, such as 'a\.w"):
        build.run(config_of(tmp_path / "other.safetensors"), tmp_path / "run")
