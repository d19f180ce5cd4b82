"""Aspect-ratio buckets: which picture is in which, batches as a function of the step, and runs that compile once."""

import itertools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ldm_jax import build
from ldm_jax.build import buckets as of_config
from ldm_jax.build import parts
from ldm_jax.data import buckets, folder, transforms
from ldm_jax.training import loop, window
from tests import tiny
from tests.test_loop import linear_run
from tests.tiny import losses, quick_compiles  # noqa: F401 (a fixture)

SIZES = ((16, 16), (12, 20), (20, 12))
SHAPES = {(40, 40): 13, (24, 40): 10, (44, 24): 9}  # (h, w) of pictures: how many


@pytest.fixture(scope="module")
def pictures():
    """Pictures whose red is their height and whose green their width; one cannot be read."""
    path = tiny.scratch() / "shapes"
    path.mkdir()
    every = [size for size, n in SHAPES.items() for _ in range(n)]
    for i, (h, w) in enumerate(np.random.default_rng(0).permutation(every)):
        Image.new("RGB", (int(w), int(h)), (int(h), int(w), i)).save(path / f"{i:02d}.png")
    (path / "99.png").write_bytes(b"no picture")
    return path


def of(path, batch=4, seed=0, sizes=SIZES, **options):
    source = folder.folder(path)
    members = buckets.nearest(source.sizes(), sizes)
    given = dict(buckets=sizes, batch=batch, seed=seed, members=members, max_bad_rate=1.0)
    return buckets.bucketed(source, **given, **options)


# --- which sizes, and which picture in which


def test_sizes_within_a_budget():
    found = buckets.within(64 * 64, 16, 2.0)
    assert found == ((48, 80), (64, 64), (80, 48))
    for h, w in buckets.within(512 * 512, 64, 2.5):
        assert h % 64 == w % 64 == 0
        assert h * w <= 512 * 512 < h * (w + 64)
        assert max(h / w, w / h) <= 2.5
    assert (512, 512) in buckets.within(512 * 512, 64)
    with pytest.raises(ValueError, match="allow no bucket"):
        buckets.within(100, 16)


def test_a_picture_is_in_the_bucket_of_the_nearest_aspect():
    sizes = np.array([[100, 100], [300, 500], [501, 300], [30, 29], [10, 100], [0, 0]])
    assert buckets.nearest(sizes, SIZES).tolist() == [0, 1, 2, 0, 1, 0]
    # Of one aspect: the nearest size.
    several = ((64, 64), (128, 128), (256, 256))
    sizes = np.array([[60, 60], [100, 100], [1000, 1000]])
    assert buckets.nearest(sizes, several).tolist() == [0, 1, 2]
    # No worse than any other, on random ones.
    sizes = np.random.default_rng(0).integers(10, 1000, (50, 2))
    for (h, w), bucket in zip(sizes, buckets.nearest(sizes, SIZES), strict=True):
        off = [abs(np.log(w / h) - np.log(v / u)) for u, v in SIZES]
        assert off[bucket] == pytest.approx(min(off))


def test_pictures_of_emptier_buckets_go_to_their_neighbours():
    sizes = np.array([[16, 16]] * 9 + [[12, 20]] * 3 + [[20, 12]] * 5)
    assert buckets.occupied(sizes, SIZES, 3) == SIZES
    assert buckets.occupied(sizes, SIZES, 4) == ((16, 16), (20, 12))
    assert buckets.occupied(sizes, SIZES, 100) == ((16, 16),)


def test_sizes_are_those_of_the_pictures_as_they_are_shown(tmp_path):
    image = Image.new("RGB", (30, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    for name in ("a.png", "b.jpg", "c.webp", "d.tif"):
        image.save(tmp_path / name)
        image.save(tmp_path / f"turned_{name}", exif=exif)
    source = folder.folder(tmp_path)
    for i, size in enumerate(source.sizes()):
        shown = transforms.decode(source[i]["image"])
        assert tuple(size) == (shown.height, shown.width), source.files[i]
    assert {tuple(size) for size in source.sizes()} == {(20, 30), (30, 20)}


# --- batches


def epoch(made):
    return sum(len(stream.source) // made.batch for stream in made.streams)


def test_batches_are_of_one_bucket_and_hold_its_pictures(pictures):
    made, seen = of(pictures), []
    for step in range(epoch(made)):
        bucket, _ = made.place(step)
        out = made[step]
        assert out["x"].shape == (4, *SIZES[bucket], 3)
        # Every picture is of one colour, which is its size.
        colours = np.round((out["x"][:, 0, 0] + 1) * 127.5).astype(int)
        nearest = buckets.nearest(colours[:, :2], SIZES)
        assert (nearest == bucket).all()
        seen += colours[:, 2].tolist()
    assert len(seen) == 4 * (3 + 2 + 2)  # of 13 and the broken one, 10 and 9
    assert len(set(seen)) >= len(seen) - 1  # another one stands in for the broken one
    assert [made.place(s)[0] for s in range(7)] != sorted(made.place(s)[0] for s in range(7))


def test_batches_are_a_function_of_the_step(pictures):
    made = of(pictures, crop="random", flip=True)
    steps = [made[s] for s in range(20)]
    again = pickle.loads(pickle.dumps(of(pictures, crop="random", flip=True)))
    for start in (0, 7):
        read = itertools.islice(again.iterate(start), 20 - start)
        for out, expected in zip(read, steps[start:], strict=True):
            np.testing.assert_array_equal(out["x"], expected["x"])
            assert "_bad" not in out
    other = of(pictures, seed=1)
    assert [other.place(s) for s in range(7)] != [made.place(s) for s in range(7)]
    # Every batch of every bucket comes once in an epoch, and those of the next one follow.
    n = epoch(made)
    for k in range(3):
        places = [made.place(s) for s in range(k * n, (k + 1) * n)]
        counts = [len(stream.source) // 4 for stream in made.streams]
        every = {(b, k * c + i) for b, c in enumerate(counts) for i in range(c)}
        assert set(places) == every
        assert len(places) == len(every)


def test_processes_share_a_batch(pictures):
    whole = of(pictures)
    parts_ = [of(pictures, process_index=i, process_count=2) for i in range(2)]
    for step in range(8):
        both = np.concatenate([part[step]["x"] for part in parts_])
        np.testing.assert_array_equal(both, whole[step]["x"])


def test_a_record_that_cannot_be_read_is_replaced_within_its_bucket(pictures):
    made, source = of(pictures), folder.folder(pictures)
    bad = [step for step in range(60) if (made[step]["_bad"] >= 0).any()]
    assert bad
    for step in bad:
        replaced = made[step]["_bad"]
        assert source.name_of(int(replaced[replaced >= 0][0])).endswith("99.png")
        assert made[step]["x"].shape == (4, 16, 16, 3)


def test_shares_are_told(pictures):
    made = of(pictures)
    assert made.shares() == {(16, 16): 3 / 7, (12, 20): 2 / 7, (20, 12): 2 / 7}
    assert made.told().startswith("buckets (height x width): 16x16 42.9%, 12x20 28.6%")


# --- runs


def config_of(pictures, *sizes, **changes):
    config = tiny.pixels()
    config.data.source.update(path=str(pictures), split="all")
    config.data.update(batch=8, max_bad_rate=1.0, **changes)
    config.mesh = dict(data=8, fsdp=1, tensor=1)
    config.data.buckets = sizes or SIZES
    return config


def mean_loss(params, frozen, batch, rng, at):
    noise = jax.random.normal(rng, batch["x"].shape)
    return jnp.mean(((batch["x"] + noise) @ params["net"]["w"] - frozen) ** 2), {}


def test_every_bucket_is_compiled_before_the_first_step(pictures, tmp_path, capsys, monkeypatch):
    compiled, steps = [], []
    heard = jax.monitoring.register_event_duration_secs_listener
    heard(lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None)
    add = window.Window.add

    def noted(self, values):
        steps.append(len(compiled))
        add(self, values)

    monkeypatch.setattr(window.Window, "add", noted)
    built = build.run(config_of(pictures), tmp_path / "built")
    assert [shape["x"].shape for shape in built.shapes] == [(8, *size, 3) for size in SIZES]
    made = of(pictures, batch=8)
    assert len({made.place(s)[0] for s in range(6)}) == 3
    often = dict(eval_every=100, save_every=100, batches=made.iterate, loss=mean_loss)
    run = linear_run(steps=6, shapes=built.shapes, told=built.told, **often)
    loop.train(run, tmp_path / "whole")
    assert len(steps) == 6
    assert len(set(steps)) == 1  # nothing is compiled after the first step
    assert "buckets (height x width): 16x16" in capsys.readouterr().err
    # The same bits after a resume.
    loop.train(run._replace(steps=3), tmp_path / "parts")
    loop.train(run, tmp_path / "parts")
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        (((16, 16), (16, 21)), "the bucket 16x21 of data.buckets fits neither model nor mesh"),
        (((16, 16), (8, 64)), "the bucket 8x64 (height x width) has 0 pictures"),
        (((16, 16), (16, 16)), "names a size twice"),
        ((16, 16), "is neither a list of (height, width) nor a budget"),
    ],
)
def test_buckets_that_cannot_be_are_refused(sizes, words, pictures, tmp_path):
    config = config_of(pictures)
    with config.ignore_type():
        config.data.buckets = sizes
    with pytest.raises(ValueError, match="bucket") as refused:
        build.run(config, tmp_path)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_budget_takes_what_there_are_pictures_for(pictures):
    config = config_of(pictures)
    with config.ignore_type():
        config.data.buckets = dict(pixels=16 * 16, step=2, ratio=2.0)
    made = of_config.batches(config, parts.training(config), ())
    assert set(made.sizes) < set(buckets.within(256, 2))
    assert all(len(stream.source) >= 8 for stream in made.streams)
    assert sum(made.shares().values()) == pytest.approx(1.0)
