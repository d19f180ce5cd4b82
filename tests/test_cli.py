"""Bad input: one sentence, exit status 2, before any compile, and nothing is written."""

import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from ldm_jax import build
from tests import tiny
from tests.tiny import quick_compiles  # noqa: F401 (a fixture of this module)


@pytest.fixture
def no_compile(monkeypatch):
    """A wrong start must be noticed before the first step is even made."""
    from ldm_jax.training import loop

    def never(*_):
        raise AssertionError("the run was started")

    monkeypatch.setattr(loop, "train", never)


def sentence(capsys):
    """The one line on stderr."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")


def refused(kind, workdir, capsys, *more):
    """The error of a training run that must not start, and must not leave anything behind."""
    before = sorted(workdir.rglob("*")) if workdir.exists() else None
    assert tiny.call("train", *tiny.arguments(kind, workdir, *more)) == 2
    assert (sorted(workdir.rglob("*")) if workdir.exists() else None) == before
    return sentence(capsys)


def with_source(path):
    return f"--config.data.source.path={path}"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("--config.optimizer.lrr=1", ["lrr", "Did you mean", "lr"]),
        ("--config.data.batch=abc", ["batch", "abc"]),
        ("--config.seed=-1", ["seed", "-1"]),
        ("--config.log.every=0", ["log.every", "0"]),
        ("--config.optimizer.name=adanw", ["did you mean"]),
        ("--config.model.name=unet.UNett", ["did you mean 'UNet'"]),
        ("--config.model.name=unett.UNet", ["did you mean 'unet'"]),
        ("--config.sampler.solver=eulr", ["did you mean 'euler'"]),
        ("--config.path.name=rectified_flw", ["did you mean 'rectified_flow'"]),
        ("--config.objective.times=unifrm", ["did you mean 'uniform'"]),
        ("--config.objective.name=difusion", ["did you mean 'diffusion'"]),
        ("--config.objective.drop=1.5", ["1.5", "probabilities"]),
        ("--config.conditioner.name=Txt", ["did you mean 'Text'"]),
        ("--config.model.groups=3", ["groups", "3"]),
        ("--config.data.source.name=folder.foldr", ["did you mean 'folder'"]),
        ("--config.data.crop=centre", ["center"]),
        ("--config.data.batch=12", ["12", "8"]),  # over eight devices
        ("--config.mesh.data=3", ["mesh", "8 devices"]),
        ("--config.data.size=15", ["15", "factor", "2"]),
        ("--config.sharding=((),)", ["sharding"]),
        ("--config.codec.run=nowhere", ["nowhere", "holds no run"]),
    ],
)
def test_a_wrong_value_is_named(override, words, tmp_path, capsys, no_compile):
    message = refused("text", tmp_path / "run", capsys, override)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(modle=dict(name="x")), ["'modle'", "did you mean 'model'"]),
        (lambda c: c.optimizer.update(lrr=1.0), ["'lrr'", "did you mean 'lr'"]),
        (lambda c: c.model.update(widht=8), ["'widht'", "did you mean 'width'"]),
        (lambda c: c.data.update(bacth=8), ["data.bacth", "did you mean 'batch'"]),
        (lambda c: c.log.update(evry=8), ["log.evry", "did you mean 'every'"]),
        (lambda c: c.log.update(keep_every=-1), ["log.keep_every", "-1", "0 turns it off"]),
        (lambda c: c.log.update(keep_best=2), ["log.keep_best", "log.metric", "validation/loss"]),
        (lambda c: c.log.update(goal="low"), ["log.goal", "'low'", "'min'"]),
        (lambda c: c.update(guards=dict(hung=5)), ["guards.hung", "did you mean 'hang'"]),
        (lambda c: c.update(guards=dict(hang="long")), ["guards.hang", "'long'", "float"]),
        (lambda c: c.update(guards=dict(spike=-1.0)), ["guards.spike", "-1"]),
        (lambda c: c.update(guards=dict(patience=3)), ["guards.patience", "log.metric"]),
        (lambda c: c.objective.update(kl_wieght=1.0), ["did you mean 'kl_weight'"]),
        (lambda c: c.optimizer.update(lr="fast"), ["lr", "'fast'", "float"]),
        (lambda c: c.data.update(flip="yes"), ["data.flip", "'yes'", "bool"]),
        (lambda c: c.update(steps="many"), ["steps", "'many'", "int"]),
        (lambda c: c.model.update(width="wide"), ["width", "'wide'", "int"]),
        (lambda c: c.model.__delattr__("name"), ["model", "name"]),
        (lambda c: c.__delattr__("optimizer"), ["optimizer"]),
        (lambda c: c.data.__delattr__("validation"), ["data", "validation"]),
    ],
)
def test_a_config_file_is_checked(change, words, tmp_path):
    from ldm_jax import build

    config = tiny.config_of("autoencoder")
    with config.ignore_type():
        change(config)
    with pytest.raises(ValueError, match=r"\S") as caught:
        build.run(config, tmp_path / "run")
    for word in words:
        assert word in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_arguments_that_are_missing_or_too_many(tmp_path, capsys):
    for argv, words in (
        ([], "--config is missing"),
        (["--config", f"{tiny.__file__}:text"], "--workdir is missing"),
        (["--config", "configs/nothere.py", "--workdir", tmp_path], "no config file"),
        (["stray"], "unknown arguments ['stray']"),
    ):
        assert tiny.call("train", *argv) == 2
        assert words in sentence(capsys)


def test_a_folder_that_is_missing_empty_or_unreadable(tmp_path, capsys, no_compile):
    run, folder = tmp_path / "run", tmp_path / "pictures"
    assert "there is no folder" in refused("autoencoder", run, capsys, with_source(folder))
    folder.mkdir()
    assert "holds no picture" in refused("autoencoder", run, capsys, with_source(folder))
    for i in range(3):
        (folder / f"{i}.png").write_bytes(b"no picture")
    message = refused("autoencoder", run, capsys, with_source(folder))
    assert "none of the 3 pictures" in message
    assert "0.png" in message


def test_captions_that_do_not_match_files(tmp_path, capsys, no_compile):
    folder = tiny.pictures(tmp_path / "pictures")
    Image.new("RGB", (16, 16)).save(folder / "extra.png")
    message = refused("text", tmp_path / "run", capsys, with_source(folder))
    assert "do not match" in message
    assert "extra.png" in message


def test_data_without_captions_cannot_train_a_text_model(tmp_path, capsys, no_compile):
    folder = tiny.pictures(tmp_path / "pictures", captions=False)
    assert "caption" in refused("text", tmp_path / "run", capsys, with_source(folder))


def test_tfds_data_that_is_not_prepared(tmp_path, capsys, no_compile):
    argv = ["--config", tiny.ROOT / "configs/demo_autoencoder.py", "--workdir", tmp_path / "run"]
    assert tiny.call("train", *argv, f"--config.data.source.data_dir={tmp_path}") == 2
    message = sentence(capsys)
    assert "not prepared" in message
    assert "python -m ldm_jax.data.shapes" in message
    assert not (tmp_path / "run").exists()


def test_a_work_directory_of_another_config(tmp_path, capsys, no_compile):
    run = tmp_path / "run"
    shutil.copytree(tiny.shared_autoencoder(), run)
    before = (run / "config.json").read_bytes()
    message = refused("autoencoder", run, capsys, "--config.optimizer.lr=0.5")
    assert "another config (optimizer.lr: 0.001 there, 0.5 here)" in message
    assert (run / "config.json").read_bytes() == before
    message = refused("text", run, capsys)
    assert "another config" in message


def test_a_run_resumed_on_other_data(tmp_path, capsys, no_compile):
    run = tmp_path / "run"
    shutil.copytree(tiny.shared_autoencoder(), run)
    folder = tiny.pictures(tmp_path / "pictures", n=40)
    config = json.loads((run / "config.json").read_text())
    config["data"]["source"]["path"] = str(folder)
    (run / "config.json").write_text(json.dumps(config))
    assert "started on other data" in refused("autoencoder", run, capsys, with_source(folder))


def test_a_codec_that_is_no_autoencoder(tmp_path, capsys, no_compile):
    run = f"--config.codec.run={tiny.shared_model('unconditional')}"
    message = refused("unconditional", tmp_path / "run", capsys, run)
    assert "not the run of an autoencoder" in message


def test_a_workdir_that_is_a_file(tmp_path, capsys, no_compile):
    (tmp_path / "run").write_text("")
    assert tiny.call("train", *tiny.arguments("autoencoder", tmp_path / "run")) == 2
    assert "is a file" in sentence(capsys)


@pytest.mark.parametrize(
    ("kind", "argv", "words"),
    [
        ("unconditional", ["--prompt", "a red square"], "unconditional; it takes no prompts"),
        ("unconditional", ["--label", "red"], "unconditional; it takes no labels"),
        ("unconditional", ["--guidance", "2"], "nothing to guide"),
        ("unconditional", ["--negative", "a dog"], "it takes no prompts"),
        ("label", ["--label", "red", "--heatmaps"], "this model reads no prompts"),
        (
            "text",
            ["--prompt", "a", "--negative", "b", "--guidance", "1"],
            "a guidance of 1 is none",
        ),
        ("text", ["--label", "red"], "it takes no labels"),
        ("text", [], "give prompts or labels"),
        ("text", ["--prompt", "nothere.txt"], "no file of prompts"),
        ("text", ["--prompt", "a", "--label", "b"], "not both"),
        ("text", ["--prompt", "a", "--solver", "eulr"], "did you mean 'euler'"),
        ("text", ["--prompt", "a", "--checkpoint", "7"], "holds no step 7; it has [0]"),
        ("text", ["--prompt", "a", "--n", "0"], "flag --n=0"),
        ("label", ["--label", "yellow"], "there is no class 'yellow'; the classes are ['blue'"),
        ("label", ["--label", "3"], "there is no class '3'"),
    ],
)
def test_what_a_model_cannot_sample(kind, argv, words, capsys):
    workdir = tiny.shared_model(kind)
    assert tiny.call("sample", "--workdir", workdir, *argv) == 2
    assert words in sentence(capsys)
    assert not (workdir / "samples").exists()


@pytest.mark.slow
def test_a_transformer_is_sampled_as_a_unet(tmp_path, capsys):
    """With its learned variance, guided; what needs a U-Net is refused."""
    workdir = tiny.shared_model("transformer")
    given = ("--workdir", workdir, "--label", "red", "--out", tmp_path)
    assert tiny.call("sample", *given, "--n", 2, "--seed", 1) == 0
    assert (tmp_path / "00001.png").is_file()
    assert tiny.call("sample", *given, "--solver", "dpmpp_2m") == 0
    capsys.readouterr()
    assert tiny.call("sample", *given, "--heatmaps", "--seed", 1) == 2
    assert "this model reads no prompts" in sentence(capsys)
    pipeline = build.pipeline(workdir)

    def draw(**guidance):
        how = build.sampling(workdir, pipeline, guidance=dict(name="pag", scale=2.0, **guidance))
        return next(pipeline.drawer(how)(pipeline.labels(["red"]), [0])).x

    with pytest.raises(ValueError, match=r"lies in the block 'mid' .* name other blocks"):
        draw()
    assert np.isfinite(draw(blocks=("block_1",))).all()


def test_workdirs_that_cannot_be_sampled(tmp_path, capsys):
    assert tiny.call("sample", "--workdir", tmp_path / "nothing") == 2
    assert "holds no run" in sentence(capsys)
    assert tiny.call("sample", "--workdir", tiny.shared_autoencoder()) == 2
    assert "only a diffusion model can be sampled" in sentence(capsys)
    started = tmp_path / "started"
    ignore = shutil.ignore_patterns("checkpoints")
    shutil.copytree(tiny.shared_model("unconditional"), started, ignore=ignore)
    assert tiny.call("sample", "--workdir", started) == 2
    assert "holds no checkpoint; train there first" in sentence(capsys)


def truncate(folder):
    """Cuts the files with arrays in a checkpoint to half."""
    for path in folder.rglob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_damaged_checkpoint(tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(tiny.shared_model("unconditional"), broken)
    truncate(broken / "checkpoints/0")
    assert tiny.call("sample", "--workdir", broken) == 2
    words = f"no checkpoint in {broken}/checkpoints is sound: step 0 is damaged"
    assert words in sentence(capsys)
    assert tiny.call("train", *tiny.arguments("unconditional", broken)) == 2
    assert words in sentence(capsys)


def test_real_processes_end_with_one_line_and_status_2(tmp_path):
    done = tiny.spawn(
        tiny.ROOT / "train.py",
        *tiny.arguments("autoencoder", tmp_path / "run", "--config.optimizer.lrr=1"),
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == ['error: \'lrr\'. Did you mean "lr" instead of "lrr"?']
    done = tiny.spawn(tiny.ROOT / "train.py", "--workdri", tmp_path / "run")
    assert done.returncode == 2
    assert done.stderr.startswith(
        "error: Unknown command line flag 'workdri'. Did you mean: workdir"
    )
    done = tiny.spawn(tiny.ROOT / "sample.py", "--workdir", tmp_path / "run")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()
    done = tiny.spawn(tiny.ROOT / "sample.py", "--help")
    assert done.returncode == 0
    assert "--prompt" in done.stdout


def test_the_devices_of_this_session_are_eight():
    """The batch of 12 and the mesh of 3 above are wrong because of that."""
    assert len(jax.devices()) == 8
    assert np.gcd(12, 8) == 4
