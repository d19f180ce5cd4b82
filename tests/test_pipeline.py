import contextlib
import dataclasses
import functools
import io
import itertools
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from absl import logging
from PIL import Image

from ldm_jax.data import pipeline, records, tokenizer, transforms


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@dataclasses.dataclass(frozen=True)
class Noise:
    """`n` pictures of their own noise; those in `broken` cannot be read."""

    n: int = 20
    broken: tuple[int, ...] = ()
    size: tuple[int, int] = (8, 8)
    name: str = "noise"
    fingerprint: str = "00"
    classes: tuple[str, ...] | None = None
    fields: tuple[str, ...] = ("image", "caption", "label", "vector", "segmentation")

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        grey = np.random.default_rng(i).integers(0, 256, self.size, dtype=np.uint8)
        return {
            "image": b"broken" if i in self.broken else png(np.stack([grey] * 3, -1)),
            "caption": [f"picture {i}", f"the picture {i}"],
            "label": i,
            "vector": np.array([i, 0.5]),
            "segmentation": png(grey),
        }

    def only(self, fields):
        return dataclasses.replace(self, fields=tuple(f for f in self.fields if f in fields))

    def name_of(self, i):
        return f"picture number {i}"

    def captions(self):
        return (caption for i in range(self.n) for caption in self[i]["caption"])


def make(source=None, **options):
    options = dict(batch=4, size=8, seed=0, fields=("label",)) | options
    return pipeline.batches(source or Noise(), **options)


def labels(batches, steps):
    return [label for step in range(steps) for label in batches[step]["label"].tolist()]


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])


def test_a_batch_is_what_the_records_say(tmp_path):
    vocabulary = tokenizer.train(Noise().captions(), tmp_path / "t.json")
    batches = make(
        fields=("label", "vector", "segmentation", "tokens"), tokenizer=vocabulary, length=9
    )
    out = batches[3]
    assert out["x"].shape == (4, 8, 8, 3)
    assert out["x"].dtype == out["vector"].dtype == np.float32
    assert {out[key].dtype for key in ("label", "segmentation", "tokens")} == {np.dtype(np.int32)}
    for j, (i, record, caption) in enumerate(
        zip(out["label"], batches.records(3), batches.captions(3), strict=True)
    ):
        assert record["label"] == i
        pixels = np.asarray(Image.open(io.BytesIO(Noise()[int(i)]["image"])))
        np.testing.assert_array_equal(out["x"][j], transforms.to_unit(pixels))
        np.testing.assert_array_equal(out["segmentation"][j], pixels[..., :1])
        np.testing.assert_array_equal(out["vector"][j], np.float32([i, 0.5]))
        assert caption in Noise()[int(i)]["caption"]
        np.testing.assert_array_equal(
            out["tokens"][j], tokenizer.encode(vocabulary, [caption], 9)[0]
        )
    assert (out["_bad"] == -1).all()


def test_every_epoch_is_a_new_permutation():
    stream = labels(make(batch=4), 15)
    epochs = [stream[first : first + 20] for first in (0, 20, 40)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    other = labels(make(batch=4, seed=1), 5)
    assert tuple(other) not in {tuple(epoch) for epoch in epochs}


def test_the_stream_does_not_depend_on_the_batch():
    assert labels(make(batch=3), 20) == labels(make(batch=5), 12)


def test_without_shuffling_the_order_is_that_of_the_source():
    batches = make(batch=8, shuffle=False, repeat=False)
    assert labels(batches, 2) == list(range(16))
    assert len(batches) == 2
    assert len(list(batches.iterate())) == 2
    with pytest.raises(IndexError, match="2 steps of 8"):
        batches[2]


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_global_batch_does_not_depend_on_the_number_of_processes(processes):
    options = dict(
        source=Noise(size=(8, 13), broken=(5, 11)),
        batch=8,
        crop="random",
        flip=True,
        fields=("label", "segmentation"),
    )
    for step in (0, 7):
        shares = [
            make(**options, process_index=i, process_count=processes)[step]
            for i in range(processes)
        ]
        assert all(len(share["x"]) == 8 // processes for share in shares)
        joined = {key: np.concatenate([share[key] for share in shares]) for key in shares[0]}
        assert_same(joined, make(**options)[step])


def test_augmentation_varies_with_epoch_and_seed_and_nothing_else():
    options = dict(source=Noise(n=4, size=(8, 16)), crop="random", flip=True)
    batches, again = make(**options), make(**options)
    assert_same(batches[5], again[5])
    views = set()
    for step in range(40):  # an epoch each: record 0 is seen 40 times
        out = batches[step]
        views.add(out["x"][out["label"] == 0].tobytes())
    assert len(views) > 10
    plain = make(Noise(n=4, size=(8, 16)))
    assert len({plain[s]["x"][plain[s]["label"] == 0].tobytes() for s in range(5)}) == 1


def test_segmentation_follows_every_crop_and_flip():
    batches = make(
        Noise(size=(11, 8)), batch=20, crop="random", flip=True, fields=("segmentation",)
    )
    out = batches[0]
    grey = np.rint((out["x"][..., 0] + 1) * 127.5).astype(np.int32)
    np.testing.assert_array_equal(out["segmentation"][..., 0], grey)


@pytest.mark.parametrize("start", [0, 3])
def test_iterating_is_indexing(start):
    batches = make(crop="random", flip=True)
    stream = batches.iterate(start)
    for step, out in enumerate(itertools.islice(stream, 12), start):
        expected = batches[step]
        del expected["_bad"]
        assert_same(out, expected)
    stream.close()


def test_worker_processes_give_the_same_stream(tmp_path):
    vocabulary = tokenizer.train(["picture the 1"], tmp_path / "t.json")
    options = dict(source=Noise(broken=(3,)), tokenizer=vocabulary, length=6, flip=True)
    plain = make(**options, max_bad_rate=0.2)
    workers = make(**options, max_bad_rate=0.2, workers=2)
    bad = records.BadRecords(workers.source, 0.2)
    stream = workers.iterate(2, bad)
    for step, out in enumerate(itertools.islice(stream, 8), 2):
        expected = plain[step]
        del expected["_bad"]
        assert_same(out, expected)
    stream.close()
    assert list(bad.named) == [3]


def test_a_broken_record_is_replaced_counted_and_named_once(monkeypatch):
    said = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: said.append(text % args))
    batches = make(Noise(broken=(5, 6)), batch=10, max_bad_rate=0.5)
    bad = records.BadRecords(batches.source, 0.5)
    seen = []
    with contextlib.closing(batches.iterate(0, bad)) as stream:
        for out in itertools.islice(stream, 8):
            assert "_bad" not in out
            seen += out["label"].tolist()
    assert seen.count(7) == 12  # 4 epochs, for itself and for 5 and 6
    assert seen.count(5) == seen.count(6) == 0
    assert (bad.seen, bad.bad) == (80, 8)
    assert len(said) == 3
    assert "picture number 5: cannot be decoded: UnidentifiedImageError" in "".join(said[:2])
    assert said[2] == "8 of 80 records of noise were replaced by others"


def test_too_many_broken_records_stop_the_run():
    with pytest.raises(ValueError, match=r"of noise could not be read.*picture number"):
        for _ in itertools.islice(make(Noise(broken=(5, 6))).iterate(), 100):
            pass
    # One in five hundred is below the limit of one in a hundred, however long one looks.
    bad = records.BadRecords(Noise(broken=(7,)), 0.01)
    for _ in range(50):
        bad.add(np.array([7] + [-1] * 499))
    assert (bad.seen, bad.bad) == (25_000, 50)
    strict = records.BadRecords(Noise(broken=(7,)), 0.0)
    with pytest.raises(ValueError, match="1 of 500 records"):
        strict.add(np.array([7] + [-1] * 499))


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_readable_stops_at_once(workers):
    batches = make(Noise(broken=tuple(range(20))), workers=workers)
    with pytest.raises(ValueError, match=r"20 records of noise in a row cannot be read"):
        next(batches.iterate())


READS = """
import multiprocessing
from tests.test_pipeline import make
stream = make(workers=1).iterate()
next(stream)
print(*[child.pid for child in multiprocessing.active_children()], flush=True)
input()
"""


@pytest.mark.slow
def test_workers_end_with_a_process_that_is_killed():
    end = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    own = os.environ | {"PYTHONPATH": os.getcwd()}
    with subprocess.Popen([sys.executable, "-c", READS], env=own, **end) as reading:
        worker = Path("/proc", reading.stdout.readline().strip())
        assert worker.is_dir()
        reading.kill()
    until = time.monotonic() + 30
    while worker.is_dir() and "(zombie)" not in (worker / "status").read_text():
        assert time.monotonic() < until
        time.sleep(0.1)


def test_batches_can_be_pickled(tmp_path):
    batches = make(tokenizer=tokenizer.train(Noise().captions(), tmp_path / "t.json"), length=8)
    assert_same(pickle.loads(pickle.dumps(batches))[2], batches[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(batch=21), "batch of 21 cannot be drawn from the 20 records of noise"),
        (dict(batch=0), "choose a batch from 1 to 20"),
        (dict(process_count=3), "choose a multiple of 3"),
        (dict(process_index=1), "number 1"),
        (dict(size=(8, 8, 3)), "neither a side"),
        (dict(size=0), "neither a side"),
        (dict(crop="middle"), "'center' or 'random'"),
        (dict(prefetch=0), "prefetch=0"),
        (dict(fields=("tokens",)), "needs a tokenizer"),
        (dict(fields=("boxes",)), "has no field 'boxes'; its fields are"),
    ],
)
def test_options_that_cannot_be_met(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_captions_must_exist_for_tokens(tmp_path):
    vocabulary = tokenizer.train(["a"], tmp_path / "t.json")
    mute = Noise().only(("image",))
    with pytest.raises(ValueError, match="no captions to make tokens of"):
        make(mute, fields=(), tokenizer=vocabulary)
    with pytest.raises(ValueError, match="has no captions"):
        make(mute, fields=()).captions(0)
    with pytest.raises(ValueError, match="no room"):
        make(tokenizer=vocabulary, length=1)


def test_fields_must_be_numbers():
    with pytest.raises(ValueError, match=r"'caption' of noise is not a number"):
        make(fields=("caption",))[0]


def test_numbers_may_be_written_as_text():
    assert records.numbers("label", ["3", "4"], Noise()).tolist() == [3, 4]
    assert records.numbers("size", ["0.5", "4"], Noise()).dtype == np.float32
    with pytest.raises(ValueError, match="whole numbers"):
        records.numbers("label", ["0.5"], Noise())
    with pytest.raises(ValueError, match="32 bits"):
        records.numbers("id", [2**40], Noise())


def test_sizes_and_several_texts_are_fields():
    texts = {name: functools.partial(len_of, k) for k, name in enumerate(["tokens", "tokens_2"])}
    batches = make(Noise(size=(10, 30)), crop="random", fields=("sizes", *texts), texts=texts)
    batch = batches[0]
    assert batch["sizes"].dtype == np.float32
    np.testing.assert_array_equal(batch["sizes"][:, [0, 1, 2, 4, 5]], [[10, 30, 0, 8, 8]] * 4)
    assert len({*batch["sizes"][:, 3]}) > 1
    assert batch["sizes"][:, 3].max() <= 24 - 8
    lengths = [[len(caption)] for caption in batches.captions(0)]
    np.testing.assert_array_equal(batch["tokens"], lengths)
    np.testing.assert_array_equal(batch["tokens_2"], np.array(lengths) + 1)
    again = pickle.loads(pickle.dumps(batches))
    assert_same(again[0], batch)


def len_of(more, captions):
    return np.array([[len(caption) + more] for caption in captions], np.int32)
