"""Checkpoints that are damaged in every way, of older runs, not saved; which of them stay."""

import contextlib
import logging
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.training import checkpoints, manifest, optimizer, sharding, step
from tests.tiny import assert_equal

PARAMS = {
    "net": {
        "kernel": np.arange(4096, dtype=np.float32).reshape(64, 64),
        "bias": np.arange(16, dtype=np.float32),
    }
}


def state_at(at):
    state = step.init_state(jax.tree.map(jnp.asarray, PARAMS), optimizer.adamw(steps=10, lr=1e-3))
    moved = jax.tree.map(lambda w: w + at, state.params)
    return state.replace(step=jnp.int32(at), params=moved, ema=jax.tree.map(jnp.negative, moved))


SHAPES = jax.eval_shape(lambda: state_at(0))  # which starts no device


def layouts():
    return sharding.state_layouts(sharding.make_mesh(), ((".*", "replicate"),), SHAPES)


def open_(workdir, *more):
    return contextlib.closing(checkpoints.Checkpoints(workdir, *more))


def save(workdir, *steps, **more):
    with contextlib.closing(checkpoints.Checkpoints(workdir, **more)) as saved:
        for at in steps:
            saved.save(state_at(at))
            saved.wait()


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A run with the steps 100 and 200."""
    workdir = tmp_path_factory.mktemp("run")
    save(workdir, 100, 200)
    return workdir


def largest(path):
    return max((p for p in path.rglob("*") if p.is_file()), key=lambda p: (p.stat().st_size, p))


def truncated(of):
    path = of()
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(of, at=0.5):
    path = of()
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 4
    path.write_bytes(content)


def half_deleted(path):
    for file in sorted(p for p in path.rglob("*") if p.is_file())[::2]:
        file.unlink()


def emptied(path):
    shutil.rmtree(path)
    path.mkdir()


def shortened(path):
    """A manifest without its last line, whose own sum no longer fits."""
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))


def of_another_step(path):
    shutil.rmtree(path / "state")
    shutil.copytree(path.parent / "100" / "state", path / "state")


DAMAGES = {  # {name: (how, whether the average is still sound)}
    "state truncated": (lambda p: truncated(lambda: largest(p / "state")), True),
    "ema truncated": (lambda p: truncated(lambda: largest(p / "ema")), False),
    "names truncated": (lambda p: truncated(lambda: p / "state/_METADATA"), True),
    "manifest truncated": (lambda p: truncated(lambda: p / manifest.NAME), False),
    "first bit of state": (lambda p: flipped(lambda: largest(p / "state"), 0.0), True),
    "a bit of state": (lambda p: flipped(lambda: largest(p / "state")), True),
    "last bit of state": (lambda p: flipped(lambda: largest(p / "state"), 1.0), True),
    "a bit of ema": (lambda p: flipped(lambda: largest(p / "ema")), False),
    "last bit of ema": (lambda p: flipped(lambda: largest(p / "ema"), 1.0), False),
    "a bit of names": (lambda p: flipped(lambda: p / "ema/_METADATA"), False),
    "a bit of the manifest": (lambda p: flipped(lambda: p / manifest.NAME), False),
    "first bit of the manifest": (lambda p: flipped(lambda: p / manifest.NAME, 0.0), False),
    "state empty": (lambda p: largest(p / "state").write_bytes(b""), True),
    "ema empty": (lambda p: largest(p / "ema").write_bytes(b""), False),
    "manifest empty": (lambda p: (p / manifest.NAME).write_bytes(b""), False),
    "a file deleted": (lambda p: largest(p / "ema").unlink(), False),
    "state deleted": (lambda p: shutil.rmtree(p / "state"), True),
    "ema deleted": (lambda p: shutil.rmtree(p / "ema"), False),
    "manifest deleted": (lambda p: (p / manifest.NAME).unlink(), False),
    "a line of the manifest deleted": (lambda p: shortened(p / manifest.NAME), False),
    "half deleted": (half_deleted, False),
    "all deleted": (emptied, False),
    "of another step": (of_another_step, True),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_step_is_passed_over_and_moved_aside(name, two_steps, tmp_path, caplog):
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "checkpoints"
    damage, sound = DAMAGES[name]
    damage(folder / "200")
    there = sorted(p.name for p in folder.iterdir())
    # Sampling reads the average alone, and moves nothing.
    ema, at = checkpoints.load_ema(tmp_path, SHAPES.ema, layouts().ema)
    assert at == (200 if sound else 100)
    assert_equal(ema, state_at(at).ema)
    assert sorted(p.name for p in folder.iterdir()) == there
    if not sound:
        with pytest.raises(checkpoints.Unreadable, match=r"step 200 in .* is damaged"):
            checkpoints.load_ema(tmp_path, SHAPES.ema, layouts().ema, step=200)
    # Training goes on from the step before, says so in one line, and saves the step anew.
    caplog.clear()
    with caplog.at_level(logging.WARNING), open_(tmp_path) as saved:
        assert_equal(saved.restore(SHAPES, layouts()), state_at(100))
        (line,) = caplog.messages
        assert "step 200 is damaged (" in line
        assert line.endswith("; step 100 is used")
        (bad,) = folder.glob("bad_200_*")
        assert bad.name in line
        saved.save(state_at(200))
        assert saved.wait() == 200
    assert manifest.problem(folder / "200") is None
    assert bad.is_dir()


def test_what_was_written_is_found_sound_by_sha256sum(two_steps):
    for at in (100, 200):
        path = two_steps / "checkpoints" / str(at)
        assert manifest.problem(path) is None
        done = subprocess.run(
            ["sha256sum", "--check", "--quiet", "--strict", manifest.NAME], cwd=path
        )
        assert done.returncode == 0
        listed = {
            line.split("  ")[1] for line in (path / manifest.NAME).read_text().splitlines()[1:]
        }
        there = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
        assert there - listed == {manifest.NAME, *manifest.NOTES}


@pytest.mark.parametrize("note", manifest.NOTES)
def test_orbaxs_notes_do_not_matter(note, two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    flipped(lambda: tmp_path / "checkpoints/200" / note)
    with open_(tmp_path) as saved:
        assert_equal(saved.restore(SHAPES, layouts()), state_at(200))
        saved.save(state_at(300))
        assert saved.wait() == 300


def test_without_a_sound_step_a_run_does_not_begin_anew(two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    for at in (100, 200):
        flipped(lambda: largest(tmp_path / f"checkpoints/{at}/ema"))
    with pytest.raises(checkpoints.Unreadable, match=r"step 200 is damaged .* step 100 is damaged"):
        checkpoints.load_ema(tmp_path, SHAPES.ema, layouts().ema)
    for _ in range(2):  # the second time nothing but the damaged ones is left
        with open_(tmp_path) as saved:
            assert saved.begun()
            with pytest.raises(checkpoints.Unreadable, match=r"no checkpoint in .* is sound"):
                saved.restore(SHAPES, layouts())


def of_an_older_run(path):
    """As it was written before there were manifests."""
    (path / manifest.NAME).unlink()
    notes = path / manifest.METADATA
    notes.write_text(notes.read_text().replace('"manifest"', '"other"'))


def test_a_step_without_manifest_of_an_older_run_is_read(two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    of_an_older_run(tmp_path / "checkpoints/200")
    with open_(tmp_path) as saved:
        assert_equal(saved.restore(SHAPES, layouts()), state_at(200))
    # What orbax itself cannot read is named; it may be whole, so it stays where it is.
    largest(tmp_path / "checkpoints/200/ema").unlink()
    with open_(tmp_path) as saved, pytest.raises(checkpoints.Unreadable, match="has no manifest"):
        saved.restore(SHAPES, layouts())
    assert (tmp_path / "checkpoints/200").is_dir()


def test_the_latest_every_nth_and_the_best_stay(tmp_path):
    scores = {10: 5.0, 20: 1.0, 30: 3.0, 40: 2.0, 50: 9.0}
    keep = checkpoints.Keep(latest=1, every=30, best=2)
    for name, lowest, stay in (
        ("lowest", True, [20, 30, 40, 60]),
        ("highest", False, [10, 30, 50, 60]),
    ):
        workdir = tmp_path / name
        save(workdir, *range(10, 70, 10), keep=keep._replace(lowest=lowest), scores=scores)
        assert manifest.steps(workdir / "checkpoints") == stay
    save(tmp_path / "plain", 1, 2, 3, 4, keep=2)
    assert manifest.steps(tmp_path / "plain" / "checkpoints") == [3, 4]


def test_saved_is_said_when_the_manifest_is_there(tmp_path, monkeypatch):
    seen = []

    def write(folder, write=manifest.write):
        seen.append((folder.name, saved.news(), (tmp_path / "checkpoints/7").exists()))
        write(folder)

    monkeypatch.setattr(manifest, "write", write)
    with open_(tmp_path) as saved:
        saved.save(state_at(7))
        saved.wait()
        assert saved.news() == [7]
    ((name, told, there),) = seen
    assert name.startswith("7.orbax-checkpoint-tmp")
    assert told == []
    assert not there


def test_a_save_that_fails_is_told_and_the_next_one_is_tried(tmp_path, monkeypatch):
    def full(folder):
        raise OSError(28, "No space left on device")

    with open_(tmp_path) as saved:
        saved.save(state_at(1))
        saved.wait()
        assert saved.news() == [1]
        with monkeypatch.context() as patched:
            patched.setattr(manifest, "write", full)
            saved.save(state_at(2))
            with pytest.raises(checkpoints.SaveFailed, match=r"step 2 .* saved is 1\. Make room"):
                saved.wait()
        assert saved.news() == []
        assert saved.trouble() == ["step 2 could not be saved (No space left on device)"]
        assert saved.trouble() == []
        saved.save(state_at(2))  # the same step again: orbax must not think that it is there
        assert saved.wait() == 2
        assert saved.news() == [2]
        assert_equal(saved.restore(SHAPES, layouts()), state_at(2))
    assert manifest.steps(tmp_path / "checkpoints") == [1, 2]
