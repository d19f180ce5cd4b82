"""`python -m ldm_jax.checkpoint`: what it lists, finds, writes and refuses."""

import contextlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from ldm_jax.training import averages, checkpoints, optimizer, step
from ldm_jax.weights import files
from tests import tiny

SHAPES = {"net": {"kernel": (3, 2), "bias": (2,)}}


def params_at(at):
    rng = np.random.default_rng(at)
    return {
        "net": {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in SHAPES["net"].items()}
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Steps 1 to 3; the average is ten times the parameters, in other digits."""
    workdir = tmp_path_factory.mktemp("run")
    with contextlib.closing(checkpoints.Checkpoints(workdir)) as saved:
        for at in (1, 2, 3):
            params = params_at(at)
            state = step.init_state(params, optimizer.adamw(steps=10, lr=1e-3))
            ema = {"net": {k: 10 * v for k, v in params["net"].items()}}
            saved.save(state.replace(step=jnp.int32(at), ema=ema))
            saved.wait()
    return workdir


def call(*argv):
    return tiny.call("ldm_jax/checkpoint", *argv)


def damaged(run, workdir):
    shutil.copytree(run, workdir, dirs_exist_ok=True)
    (workdir / "checkpoints/2/ema/_METADATA").write_text("{}")
    (workdir / "checkpoints/1").rename(workdir / "checkpoints/bad_1_then")
    return workdir


def test_steps_are_listed_and_verified(run, tmp_path, capsys):
    assert call("list", run) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["1", "2", "3"]
    assert all(line.endswith("durable") for line in lines)
    assert call("verify", run) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        [str(at), "sound"] for at in (1, 2, 3)
    ]
    workdir = damaged(run, tmp_path)
    assert call("verify", workdir) == 1
    bad, good = capsys.readouterr().out.splitlines()
    assert bad.startswith("       2  damaged: 1 of its ")
    assert bad.endswith(" files are not what was written, such as ema/_METADATA")
    assert good.split() == ["3", "sound"]
    assert call("list", workdir) == 0
    assert "bad_1_then" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(("of", "factor"), [("ema", 10), ("params", 1)])
def test_a_step_is_exported(of, factor, run, tmp_path, capsys):
    out = tmp_path / "deep" / "one.safetensors"
    for argv, at in ((("--step", 2), 2), ((), 3)):
        assert call("export", run, "--of", of, "--out", out, *argv) == 0
        tensors = load_file(out)
        assert set(tensors) == {"net/kernel", "net/bias"}
        for name, value in params_at(at)["net"].items():
            np.testing.assert_array_equal(tensors[f"net/{name}"], factor * value)
        assert capsys.readouterr().out == f"{out}: {of} of step {at}\n"
        assert files.metadata(out)["steps"] == str(at)


def test_an_average_is_the_mean(run, tmp_path):
    out = tmp_path / "mean.safetensors"
    assert call("average", run, "--steps", "1,3", "--of", "params", "--out", out) == 0
    for name, value in load_file(out).items():
        of = [np.asarray(params_at(at)["net"][name[4:]], np.float64) for at in (1, 3)]
        np.testing.assert_array_equal(value, np.mean(of, axis=0).astype(np.float32))
        assert value.dtype == np.float32


@pytest.fixture(scope="module")
def profiles(tmp_path_factory):
    """Steps 5, 10 ... 60 of a run with several averages, and what an average of sigma_rel 0.08 has become."""
    workdir, kinds = tmp_path_factory.mktemp("profiles"), (0.05, 0.1, 0.08)
    of = {kind: averages.power(kind) for kind in kinds}
    held = {kind: params_at(0) for kind in kinds}
    with contextlib.closing(checkpoints.Checkpoints(workdir, keep=100)) as saved:
        for at in range(1, 61):
            held = {k: of[k].move(held[k], params_at(at), jnp.int32(at - 1)) for k in kinds}
            if at % 5 == 0:
                ema = {"0.5": params_at(at)} | {of[k].name: held[k] for k in kinds[:2]}
                state = step.init_state(params_at(at), optimizer.adamw(steps=10, lr=1e-3))
                saved.save(state.replace(step=jnp.int32(at), ema=ema))
    return workdir, held[0.08]["net"]


def test_a_width_that_was_not_tracked_is_made_of_those_that_were(profiles, tmp_path, capsys):
    (workdir, wanted), out = profiles, tmp_path / "posthoc.safetensors"
    assert call("average", workdir, "--sigma_rel", 0.08, "--out", out) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert second == f"{out}: ema of step {', '.join(map(str, range(5, 61, 5)))}"
    assert float(first.split()[-1].rstrip("%")) < 2
    tensors = load_file(out)
    assert set(tensors) == {f"net/{name}" for name in wanted}
    for name, value in wanted.items():
        np.testing.assert_allclose(tensors[f"net/{name}"], value, atol=0.02)
        assert tensors[f"net/{name}"].dtype == np.float32
    assert files.metadata(out)["sigma_rel"] == "0.08"
    # One that was tracked is what it was, at an earlier step.
    assert call("average", workdir, "--sigma_rel", 0.1, "--step", 35, "--out", out) == 0
    made = load_file(out)
    assert call("export", workdir, "--ema", "power_0.1", "--step", 35, "--out", out) == 0
    for name, value in load_file(out).items():
        np.testing.assert_allclose(made[name], value, atol=1e-6)


def test_a_damaged_step_is_passed_over(profiles, tmp_path, caplog):
    workdir, out = tmp_path / "run", tmp_path / "posthoc.safetensors"
    shutil.copytree(profiles[0], workdir)
    (workdir / "checkpoints/40/ema/_METADATA").write_text("{}")
    assert call("average", workdir, "--sigma_rel", 0.08, "--out", out) == 0
    assert "step 40 is damaged" in caplog.text
    assert files.metadata(out)["steps"] == ",".join(str(n) for n in range(5, 61, 5) if n != 40)
    for name, value in profiles[1].items():
        np.testing.assert_allclose(load_file(out)[f"net/{name}"], value, atol=0.05)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("export",), "holds the averages 0.5, power_0.05, power_0.1; name one by --ema"),
        (("export", "--ema", "0.6"), "holds the averages 0.5, power_0.05"),
        (("average", "--sigma_rel", "0.5"), "sigma_rel = 0.5 is no width"),
        (("average", "--sigma_rel", "0.1", "--steps", "5,10"), "leave out --steps"),
        (("average", "--sigma_rel", "0.1", "--step", "4"), "holds no step 4"),
    ],
)
def test_what_is_wrong_with_averages_is_said(argv, words, profiles, tmp_path, capsys):
    verb, *more = argv
    assert call(verb, profiles[0], "--out", tmp_path / "out.safetensors", *more) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ((), "give one of list, verify, export, average and a work directory"),
        (("lst", "RUN"), "give one of list, verify"),
        (("list", "nowhere"), "nowhere holds no checkpoint"),
        (("verify", "nowhere"), "nowhere holds no checkpoint"),
        (("export", "nowhere", "--out", "OUT"), "nowhere holds no checkpoint"),
        (("export", "RUN"), "--out is missing"),
        (("export", "RUN", "--out", "OUT", "--step", "7"), "holds no step 7; it has [2, 3]"),
        (("export", "RUN", "--out", "OUT", "--step", "2"), "step 2 in"),
        (("export", "RUN", "--out", "OUT", "--of", "emma"), "ema"),
        (("export", "RUN", "--out", "OUT", "--ema", "0.9"), "holds one average alone"),
        (("average", "RUN", "--out", "OUT", "--sigma_rel", "0.1"), "no power-function averages"),
        (("average", "RUN", "--out", "OUT"), "--steps is missing"),
        (("average", "RUN", "--out", "OUT", "--steps", "3"), "must be two steps or more"),
        (("average", "RUN", "--out", "OUT", "--steps", "3,x"), "must be whole numbers"),
        (("average", "RUN", "--out", "OUT", "--steps", "2,3"), "is damaged"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(argv, words, run, tmp_path, capsys):
    places = {"RUN": damaged(run, tmp_path / "run"), "OUT": tmp_path / "out.safetensors"}
    assert call(*(places.get(a, a) for a in argv)) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("error: ")
    assert words in told
    assert not (tmp_path / "out.safetensors").exists()
