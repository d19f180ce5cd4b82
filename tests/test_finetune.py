"""Runs that start from pretrained weights: what is loaded, trained, kept, resumed and sampled; what is refused."""

import contextlib
import importlib
import json
import shutil

import jax
import numpy as np
import pytest

import ldm_jax
from ldm_jax import build, media, tree
from ldm_jax.build import pretrained
from ldm_jax.pretrained import start
from ldm_jax.training import checkpoints, loop, sharding
from ldm_jax.weights import files
from tests import model_folders, tiny
from tests.tiny import quick_compiles  # noqa: F401 (a fixture of this module)


def config_of(kind="sd15", **changes):
    config = importlib.import_module(f"configs.{kind}_finetune").get_config()
    config = model_folders.smaller(config, kind)
    config.update(changes)
    return config


def stored(folder):
    return {k: np.asarray(v) for k, v in files.read(next(folder.glob("*.safetensors"))).items()}


def arguments(kind, workdir, *more):
    """Of train.py; the reduced config is written by hand, as a user would."""
    folder, pictures = model_folders.shared(kind), tiny.shared_pictures()
    given = {
        "init.path": folder,
        "init.dtype": "float32",
        "init.remat": False,
        "data.source.path": pictures,
        "data.validation.split": "all",
        "data.batch": 8,
        "data.size": 8,
        "data.workers": 0,
        "log.every": 1,
        "log.batches": 1,
        "log.samples": 1,
        "sampler.steps": 2,
    }
    config = tiny.ROOT / f"configs/{kind}_finetune.py"
    set_ = [f"--config.{key}={value}" for key, value in given.items()]
    return ["--config", config, "--workdir", workdir, *set_, *more]


@pytest.mark.slow
def test_a_run_of_xl_trains_resumes_and_is_sampled(tmp_path, capsys):
    workdir = tmp_path / "run"
    assert tiny.call("train", *arguments("sdxl", workdir, "--config.steps=3")) == 0
    lines = tiny.losses(workdir)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(np.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines)
    assert any("validation/loss" in line for line in tiny.metrics(workdir))
    assert (workdir / "images/samples_00000003.png").is_file()
    # It goes on from its checkpoint, where what is not trained is not; that is known by its hash.
    run = build.run(build.workdir.read_config(workdir), workdir)
    with contextlib.closing(checkpoints.Checkpoints(workdir)) as saved:
        state, _ = loop.start_state(run._replace(load=None), saved)
    assert int(state.step) == 3
    assert {name.split("/")[0] for name in tree.names(state.params)} == {"network"}
    assert set(json.loads((workdir / "init.json").read_text())) >= {"path", "frozen_sha256"}
    argv = ["--workdir", workdir, "--prompt", "a red square", "--n", 2, "--steps", 1]
    assert tiny.call("sample", *argv) == 0
    assert media.read_png_text(workdir / "samples/00001.png")["prompt"] == "a red square"
    capsys.readouterr()

    # What was trained goes back into a folder of diffusers.
    folder, mine = model_folders.shared("sdxl"), tmp_path / "mine"
    trained = build.pipeline(workdir).params["network"]
    ldm_jax.from_pretrained(folder).with_params({"unet": trained}).save_pretrained(mine)
    before, after = stored(folder / "unet"), stored(mine / "unet")
    assert before.keys() == after.keys()
    assert any((before[name] != after[name]).any() for name in before)
    same = ldm_jax.from_pretrained(mine).component_params()["unet"]
    tiny.assert_equal(same, trained)

    # A folder may move; then with other text encoders, and then without the folder.
    elsewhere = shutil.copytree(model_folders.shared("sdxl"), tmp_path / "elsewhere")
    config = build.workdir.read_config(workdir)
    config.init.path = str(elsewhere)
    build.run(config, workdir)
    assert build.workdir.read_config(workdir).init.path == str(elsewhere)
    encoder = next((elsewhere / "text_encoder_2").glob("*.safetensors"))
    files.write(encoder, {k: v + 1 for k, v in stored(encoder.parent).items()})
    assert tiny.call("sample", *argv) == 2
    assert "not those that the run" in capsys.readouterr().err
    shutil.rmtree(elsewhere)
    assert tiny.call("sample", *argv) == 2
    message = capsys.readouterr().err
    assert f"from {elsewhere}, and there is no such folder or file" in message
    assert str(workdir / "config.json") in message


def test_a_run_begins_with_the_weights_of_the_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(sharding, "FSDP_MIN_SIZE", 64)
    config = config_of("sd15")
    run = build.run(config, tmp_path / "run")
    with contextlib.closing(checkpoints.Checkpoints(tmp_path / "run")) as saved:
        state, layouts = loop.start_state(run, saved)
    assert int(state.step) == 0
    of = pretrained.opened(config)
    folder = model_folders.shared("sd15")
    parts = {"unet": state.params["network"], "vae": run.frozen["arrays"]["params"]}
    parts["text_encoder"] = run.frozen["params"]["conditioner"]["encoder"]
    for name, params in parts.items():
        exported, expected = of.components[name].export(params), stored(folder / name)
        assert exported.keys() == expected.keys()
        for key, value in expected.items():
            np.testing.assert_array_equal(exported[key], value, err_msg=key)
    tiny.assert_equal(state.ema, state.params)
    assert float(run.frozen["arrays"]["scale"]) == np.float32(0.18215)
    split = [x for x in jax.tree.leaves(state.params) if "fsdp" in x.sharding.spec]
    assert split
    for leaf, layout in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(layouts.params), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(layout, leaf.ndim)


def test_text_encoders_are_trained_if_asked(tmp_path):
    config = config_of("sdxl")
    config.init.train_text_encoder = True
    run = build.run(config, tmp_path / "run")
    shapes = jax.eval_shape(run.init, jax.random.key(0))
    assert set(shapes) == {"network", "conditioner"}
    assert run.frozen["params"] == {}
    params = run.load(sharding.layouts(run.mesh, run.rules, shapes))
    assert tree.names(params) == tree.names(shapes)


def test_what_the_folder_says_can_be_said_otherwise():
    config = config_of("sd15")
    assert pretrained.opened(config).model.target.row(None, 0.5) == (0.0, 1.0)  # eps
    config.target = dict(name="v")
    assert pretrained.opened(config).model.target != pretrained.opened(config_of()).model.target
    v = pretrained.opened(config_of("sd21")).model
    t = np.float32(0.3)
    np.testing.assert_allclose(v.target.row(v.path, t), (-v.path.sigma(t), v.path.alpha(t)))


def test_the_autoencoder_of_xl_computes_in_float32():
    of, plain = (
        start.from_folder(model_folders.shared(k), dtype="bfloat16") for k in ("sdxl", "sd15")
    )
    assert [of.components[name].module.dtype for name in ("unet", "vae")] == ["bfloat16", "float32"]
    assert plain.components["vae"].module.dtype == "bfloat16"


def test_a_single_file_starts_as_its_folder_does(tmp_path):
    kind = "sdxl"
    folder, path = model_folders.shared(kind), tmp_path / "whole.safetensors"
    ldm_jax.from_pretrained(folder).save_pretrained(path, layout="original")
    config, plain = config_of(kind), config_of(kind)
    config.init.update(weights="original", path=str(path), config=str(folder))
    runs = [build.run(c, tmp_path / name) for c, name in ((config, "file"), (plain, "folder"))]
    begun = []
    for run in runs:
        shapes = jax.eval_shape(run.init, jax.random.key(0))
        begun.append((run.load(sharding.layouts(run.mesh, run.rules, shapes)), run.frozen))
    assert tree.names(begun[0]) == tree.names(begun[1])
    tiny.assert_equal(*begun)
    assert pretrained.opened(config).model == pretrained.opened(plain).model
    # The same run goes on where the file and its tokenizers were moved, and not with another file.
    moved = config.copy_and_resolve_references()
    names = [name.name for name in folder.glob("tokenizer*")]
    moved.init.path = str(shutil.copy(path, tmp_path / "moved.safetensors"))
    moved.init.config = str(shutil.copytree(folder, tmp_path / "moved"))
    moved.init.tokenizers = tuple(str(tmp_path / "moved" / name) for name in sorted(names))
    build.run(moved, tmp_path / "file")
    tensors = {k: np.asarray(v) for k, v in files.read(path).items()}
    tensors["first_stage_model.decoder.conv_out.bias"] += 1
    path.unlink()
    files.write(path, tensors)
    with pytest.raises(ValueError, match="not those that the run"):
        build.run(config, tmp_path / "file")


def without(folder, name, tmp_path):
    """A copy of a folder that lacks a file."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / name).unlink()
    return copy


REFUSED = [
    (lambda c: c.init.update(path="path/to/stable-diffusion-v1-5"), "--config.init.path=..."),
    (lambda c: c.init.update(weights="difusers"), "did you mean 'diffusers'"),
    (lambda c: c.init.update(variant="fp16"), "fp16"),
    (lambda c: c.init.update(weights="original"), "is no file"),
    (lambda c: c.init.update(tokenizers=("a",)), "init.tokenizers is of no use"),
    (lambda c: c.init.update(path=str(tiny.ROOT / "train.py")), "is no folder"),
    (lambda c: c.init.update(dtype="int8"), "'int8'"),
    (lambda c: c.update(model=dict(name="unet.UNet", width=8)), "['model'] contradict 'init'"),
    (lambda c: c.update(tokenizer=dict(kind="bpe")), "['tokenizer'] contradict 'init'"),
    (lambda c: c.update(path=dict(name="rectified_flow")), "eps"),
    (lambda c: c.data.update(size=9), "9"),
    (lambda c: c.data.update(size=10), "5"),
    (lambda c: c.objective.update(drop=dict(label=0.1)), "'label'"),
    (lambda c: c.data.source.update(path=str(tiny.shared_classes())), "no captions"),
    (lambda c: c.update(sharding=((".*atn", "fsdp"),)), "atn"),
]


@pytest.mark.parametrize(("change", "words"), REFUSED)
def test_what_cannot_be_started_is_told(change, words, tmp_path):
    config = config_of()
    with config.unlocked(), config.ignore_type():
        change(config)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        build.run(config, tmp_path / "run")
    assert words in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_not_whole_is_told(tmp_path):
    config = config_of()
    weights = "unet/diffusion_pytorch_model.safetensors"
    config.init.path = str(without(model_folders.shared("sd15"), weights, tmp_path))
    with pytest.raises(FileNotFoundError, match="holds no diffusion_pytorch_model"):
        build.run(config, tmp_path / "run")
    # Of another model: the names are looked at, not a tensor is read.
    shutil.copy(model_folders.shared("sdxl") / weights, tmp_path / "copy" / weights)
    with pytest.raises(ValueError, match="not those of this network"):
        build.run(config, tmp_path / "run")


def test_captions_that_are_cut_are_logged(caplog):
    rows = pretrained.opened(config_of("sd15")).texts["tokens"]
    rows(["a red square", "a horse " * 37 + "a"])  # 75 pieces fit
    assert not caplog.records
    ids = rows(["a red square", "a horse " * 200])
    assert ids.shape == (2, 77)
    assert "1 of 2 captions were cut to 77 tokens" in caplog.text
