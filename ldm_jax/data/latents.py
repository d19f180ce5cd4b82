"""Pictures that were encoded beforehand, as a source of training: what `python -m ldm_jax.cache` writes.

A cache is a folder. Of each of its splits, "train" and "validation", it holds a plan and the shards that it names:

    train.json                           what was encoded, by which autoencoder, and how: a `Plan`
    train-00003-of-00012.array_record    a record a picture
    train-00003-of-00012.jsonl           the captions of these records, where the data has captions

A record has the number of its picture in the source, so that order, shuffling, and sharding by process are those of
the one pipeline. It is a safetensors file of its own: `moments` [f h w k], the mean and the log-variance of the
posterior side by side, of the picture and, with f = 2, of its mirror image; and the other fields as the picture's
record has them. An autoencoder without a posterior leaves its latents there instead. Text encoders that are not trained
have left what they make of each caption, `tokens_states` [m n d] and `tokens_pooled` [m d].

Where the pictures of training are in buckets (`buckets`), each has the size of its own, and the records lie bucket by
bucket, those of one in the order of the source: the plan has but to know how many they are.

A shard gets its name when it is whole. What was interrupted goes on with the shards that are not there.
"""

import contextlib
import functools
import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_data_source, array_record_module
from safetensors import SafetensorError
from safetensors.numpy import load, save

from ldm_jax.data import buckets, examples, records, transforms

MOMENTS, CAPTION = "moments", "caption"
BY_SIDE = (MOMENTS, examples.SIZES, "segmentation")  # of the picture, and of its mirror image
BY_CAPTION = ("_states", "_pooled")  # names of what a text encoder made of each of the captions
WRITER = "group_size:1,uncompressed"  # random access; noise does not compress


@dataclass(frozen=True)
class Plan:
    """What a split of a cache holds."""

    name: str  # of the source ...
    source: str  # ... and its fingerprint
    classes: tuple[str, ...] | None
    records: int
    shard: int  # records of a shard; the last one may have fewer
    size: tuple[int, int]  # (h, w) of the pictures
    flips: int  # 1, or 2 with the mirror images
    moments: tuple[int, ...]  # [h w k]
    posterior: bool  # moments are mean and log-variance; otherwise they are the latents
    dtype: str  # of floats, as they are stored
    fields: tuple[str, ...]  # what else a record holds
    codec: dict[str, Any]  # where the autoencoder came from, and its sha256
    text: str = ""  # sha256 of the text encoders by which captions are encoded, too
    buckets: tuple[tuple[int, int, int], ...] = ()  # (h, w) of pictures, and how many; of all: none

    @property
    def fingerprint(self) -> str:
        told = {k: v for k, v in asdict(self).items() if k != "buckets" or v}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def plan_path(path: str | os.PathLike, split: str) -> Path:
    return Path(path) / f"{split}.json"


def read_plan(path: str | os.PathLike, split: str) -> Plan | None:
    """The plan of a split, or None.

    Raises:
      ValueError: a file that is none.
    """
    file = plan_path(path, split)
    if not file.is_file():
        return None
    try:
        given = json.loads(file.read_text())
        lists = {k: tuple(v) for k, v in given.items() if isinstance(v, list)}
        lists["buckets"] = tuple(map(tuple, given.get("buckets", ())))
        return Plan(**given | lists)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} is no plan of a cache ({error}); write the cache anew") from error


def write_plan(path: str | os.PathLike, split: str, plan: Plan) -> None:
    """Writes it at once; several processes may do so at the same time."""
    file = plan_path(path, split)
    temporary = file.with_suffix(f".{uuid.uuid4().hex}")
    temporary.write_text(json.dumps(asdict(plan), indent=2) + "\n")
    os.replace(temporary, file)


def shards(path: str | os.PathLike, split: str, plan: Plan) -> list[Path]:
    """The files of a split, in order; those that are written are there."""
    count = -(-plan.records // plan.shard)
    return [Path(path) / f"{split}-{k:05d}-of-{count:05d}.array_record" for k in range(count)]


def numbers_of(plan: Plan, shard: int) -> range:
    """The records of a shard."""
    return range(shard * plan.shard, min((shard + 1) * plan.shard, plan.records))


def write_shard(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes all records of a shard; until the last one is written, the file has another name.

    Raises:
      OSError: the disk is full, say.
    """
    temporary = path.with_suffix(".part")
    writer, captions = array_record_module.ArrayRecordWriter(str(temporary), WRITER), []
    for row in rows:
        told = dict(row)
        if CAPTION in told:
            captions.append(json.dumps(told[CAPTION]) + "\n")
            told[CAPTION] = np.frombuffer(captions[-1].encode(), np.uint8)
        with _written(path):
            writer.write(save({k: np.require(v, requirements="C") for k, v in told.items()}))
    with _written(path):
        writer.close()
    if captions:
        beside = path.with_suffix(".jsonl")
        beside.with_suffix(".tmp").write_text("".join(captions))
        os.replace(beside.with_suffix(".tmp"), beside)
    os.replace(temporary, path)


@contextlib.contextmanager
def _written(path: Path) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise OSError(f"{path} could not be written: {error}") from error


@dataclass(frozen=True)
class Cached:
    """A split of a cache by number: a `records.Source` whose records hold `moments` in place of a picture."""

    name: str
    fingerprint: str
    classes: tuple[str, ...] | None
    files: tuple[str, ...] = field(repr=False)
    plan: Plan = field(repr=False)

    def __len__(self) -> int:
        return self.plan.records

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            record = load(_open(self.files)[index])
        except (SafetensorError, RuntimeError, ValueError) as error:
            raise _damaged(self.files[index // self.plan.shard], error) from error
        if CAPTION in record:
            record[CAPTION] = json.loads(record[CAPTION].tobytes())
        return record

    @property
    def fields(self) -> tuple[str, ...]:
        return (MOMENTS, *self.plan.fields)

    def only(self, fields: Sequence[str]) -> "Cached":
        """The same records: a record is read whole."""
        return self

    def name_of(self, index: int) -> str:
        return f"record {index} of {self.name}"

    def captions(self) -> Iterator[str]:
        for file in self.files if CAPTION in self.plan.fields else ():
            with Path(file).with_suffix(".jsonl").open(encoding="utf-8") as lines:
                for line in lines:
                    caption = json.loads(line)
                    yield from [caption] if isinstance(caption, str) else caption


def _damaged(file: str, error: Exception) -> ValueError:
    return ValueError(
        f"{file} is damaged ({error}); remove it, and write the cache again, which writes this file alone"
    )


def _count(files: tuple[str, ...]) -> int:
    """The records of these files.

    Raises:
      ValueError: one of them is damaged.
    """
    try:
        return len(_open(files))
    except RuntimeError as error:
        if len(files) == 1:
            raise _damaged(files[0], error) from error
        return sum(_count((file,)) for file in files)


@functools.lru_cache(maxsize=16)
def _open(files: tuple[str, ...]) -> array_record_data_source.ArrayRecordDataSource:
    return array_record_data_source.ArrayRecordDataSource(list(files))


def cached(path: str | os.PathLike, split: str) -> Cached:
    """A split of the cache in a folder.

    Raises:
      FileNotFoundError: there is no such cache, or shards of it are missing.
      ValueError: shards that are damaged, or do not hold what the plan says.
    """
    plan = read_plan(path, split)
    again = f"python -m ldm_jax.cache --config ... --out {path}"
    if plan is None:
        raise FileNotFoundError(
            f"there is no cache of the {split} split in {str(path)!r}; write it: {again}"
        )
    files = shards(path, split, plan)
    if absent := [file.name for file in files if not file.is_file()]:
        raise FileNotFoundError(
            f"{len(absent)} of the {len(files)} files of the cache {str(path)!r} ({split}) are missing, the first is "
            f"{absent[0]}; the command that writes the cache writes them alone: {again}"
        )
    found = Cached(
        name=f"latents of {plan.name}",
        fingerprint=plan.fingerprint,
        classes=plan.classes,
        files=tuple(map(str, files)),
        plan=plan,
    )
    if (held := _count(found.files)) != plan.records:
        raise ValueError(
            f"the cache {str(path)!r} ({split}) holds {held} records and not {plan.records}; write it anew"
        )
    return found


def shown(
    record: dict[str, Any], fields: Sequence[str], rng: np.random.Generator, *, flip: bool
) -> dict[str, Any]:
    """An example of a cached record; `flip` and captions draw what `examples.picture` draws from the generator."""
    side = int(transforms.draws(rng)[2] and flip)

    captions = examples.captions_of(record) if CAPTION in record else []
    chosen = examples.choice(captions, rng)

    def of(name):
        if name in BY_SIDE:
            return record[name][side]
        return record[name][chosen] if name.endswith(BY_CAPTION) else record[name]

    example = {name: of(name) for name in fields} | {"x": of(MOMENTS).astype(np.float32)}
    return example | ({CAPTION: captions[chosen]} if captions else {})


@dataclass(frozen=True)
class Views:
    """What is encoded of the records of a source: pictures cut in their centre, `x` [f h w 3], and their fields.

    Pictures of different sizes are from several sources, one after the other. A record that cannot be shown is replaced
    as in the pipeline, by one of its own source, and `_bad` says so.
    """

    parts: tuple[tuple[buckets.Members, tuple[int, int]], ...]  # with (h, w) of their pictures
    numbers: Sequence[int]  # of the records, through all of them
    flips: int
    fields: tuple[str, ...]  # without captions, which are kept where there are any

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, position: int) -> dict[str, Any]:
        index = int(self.numbers[position])
        part = 0
        while index >= len(self.parts[part][0]):
            index -= len(self.parts[part][0])
            part += 1
        source, size = self.parts[part]
        at, example = records.readable(source, index, lambda record: self._both(record, size))
        return example | {"_bad": -1 if at == index else int(source.numbers[index])}

    def _both(self, record: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
        image, original = transforms.decode_sized(record["image"], at_least=size)
        drawn = np.random.default_rng(0)  # a window in the centre does not depend on it
        view = transforms.window(image.size, size, crop="center", flip=False, rng=drawn)
        sides = [
            examples.seen(record, self.fields, image, original, view._replace(flip=flip), size)
            for flip in (False, True)[: self.flips]
        ]
        example = {"x": np.stack([side["x"] for side in sides])}
        for name in self.fields:
            values = [records.numbers(name, [side[name]], self.parts[0][0])[0] for side in sides]
            example[name] = np.stack(values) if name in BY_SIDE else values[0]
        return example | ({CAPTION: record[CAPTION]} if CAPTION in record else {})
