"""Aspect-ratio buckets: pictures of any shape, in batches that have one of a few.

A bucket is a size (h, w). A picture belongs to the bucket whose aspect is nearest to its own, of several such to that
whose area is, and is seen there as everywhere (`transforms`): resized and cut to that size. A batch is of one bucket.

As in the plain pipeline all follows from the step. Of a bucket with n pictures n // batch batches belong to an epoch;
the batches of all buckets are shuffled together, anew in each epoch. So step s has a bucket and a number among its
batches, and each bucket's own stream of pictures (a `Batches`) says which these are.
"""

import dataclasses
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import grain
import numpy as np
from jaxtyping import Int

from ldm_jax.data import pipeline, records

Size = tuple[int, int]  # (h, w)


@runtime_checkable
class Sized(Protocol):
    """A source that knows the sizes of its pictures without decoding them."""

    def sizes(self) -> Int[np.ndarray, "n 2"]:
        """(h, w) of every picture as it is shown; (0, 0) of one that cannot be read."""


def within(pixels: int, step: int, ratio: float = 2.0) -> tuple[Size, ...]:
    """All sizes of multiples of `step` with at most so many pixels, each as wide as it can be.

    No side is more than `ratio` times the other.

    Raises:
      ValueError: there is none.
    """
    if step < 1 or ratio < 1 or pixels < step**2:
        raise ValueError(
            f"pixels={pixels}, step={step}, ratio={ratio} allow no bucket; pixels must be at least step * step, and "
            "ratio at least 1"
        )
    found = []
    for h in range(step, math.isqrt(math.ceil(pixels * ratio)) + 1, step):
        w = pixels // h // step * step
        if w and max(h / w, w / h) <= ratio:
            found.append((h, w))
    # Of several heights with the same width the tallest has the most pixels.
    return tuple((h, w) for h, w in found if (h + step, w) not in found)


def nearest(sizes: Int[np.ndarray, "n 2"], buckets: Sequence[Size]) -> Int[np.ndarray, " n"]:
    """The number of each picture's bucket; 0 for a picture without a size."""
    known = np.maximum(sizes, 1).astype(np.float64)
    wanted = np.asarray(buckets, np.float64)

    def distance(of):
        return np.abs(np.log(of(known))[:, None] - np.log(of(wanted))[None])

    aspect = distance(lambda s: s[:, 1] / s[:, 0])
    area = distance(lambda s: s[:, 0] * s[:, 1])
    same = aspect <= aspect.min(1, keepdims=True) + 1e-9
    return np.where(sizes.min(1) > 0, np.where(same, area, np.inf).argmin(1), 0)


def occupied(
    sizes: Int[np.ndarray, "n 2"], buckets: Sequence[Size], least: int
) -> tuple[Size, ...]:
    """The buckets that have `least` pictures or more, once those of the emptier ones have gone to their neighbours."""
    left = list(buckets)
    while len(left) > 1:
        counts = np.bincount(nearest(sizes, left), minlength=len(left))
        if counts.min() >= least:
            break
        del left[int(counts.argmin())]
    return tuple(left)


@dataclass(frozen=True, eq=False)
class Members:
    """Some records of a source, as a source."""

    source: records.Source
    numbers: Int[np.ndarray, " n"] = field(repr=False)
    name: str
    fingerprint: str
    classes: tuple[str, ...] | None

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.source[int(self.numbers[index])]

    @property
    def fields(self) -> tuple[str, ...]:
        return self.source.fields

    def only(self, fields: Sequence[str]) -> "Members":
        return dataclasses.replace(self, source=self.source.only(fields))

    def name_of(self, index: int) -> str:
        return self.source.name_of(int(self.numbers[index]))

    def captions(self) -> Iterator[str]:
        return self.source.captions()


def part(source: records.Source, numbers: Int[np.ndarray, " n"]) -> Members:
    """The records of a source that have these numbers."""
    return Members(source, numbers, source.name, source.fingerprint, source.classes)


@dataclass(frozen=True, eq=False)
class Bucketed:
    """`self[step]` is the batch of a step, of one of the buckets; see `bucketed`."""

    source: records.Source
    sizes: tuple[Size, ...]
    streams: tuple[pipeline.Batches, ...] = field(repr=False)  # of each bucket
    batch: int
    seed: int
    workers: int
    prefetch: int
    max_bad_rate: float

    def __len__(self) -> int:
        return sys.maxsize

    def place(self, step: int) -> tuple[int, int]:
        """The bucket of a step, and which of its batches it is."""
        counts = [len(stream.source) // self.batch for stream in self.streams]
        ends = np.cumsum(counts)
        mixed = grain.MapDataset.range(int(ends[-1])).shuffle(seed=pipeline.seed_of(self.seed))
        number = int(mixed[step])
        bucket = int(np.searchsorted(ends, number, side="right"))
        first = int(ends[bucket]) - counts[bucket]
        return bucket, step // int(ends[-1]) * counts[bucket] + number - first

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        """As `Batches` has it; `_bad` are numbers of the source."""
        bucket, at = self.place(step)
        stream = self.streams[bucket]
        out = stream[at]
        out["_bad"] = np.where(out["_bad"] < 0, -1, stream.source.numbers[out["_bad"]])
        return out

    def iterate(
        self, start_step: int = 0, bad: records.BadRecords | None = None
    ) -> Iterator[dict[str, np.ndarray]]:
        """The batches from a step on; see `Batches.iterate`."""
        return pipeline.iterate(self, start_step, bad)

    def examples(self) -> list[dict[str, np.ndarray]]:
        """A row of a batch of each bucket, without what is told about it."""
        alone = dict(batch=1, process_index=0, process_count=1)
        first = [dataclasses.replace(stream, **alone)[0] for stream in self.streams]
        return [{k: v for k, v in out.items() if not k.startswith("_")} for out in first]

    def shares(self) -> dict[Size, float]:
        """The share of the samples that falls into each bucket."""
        counts = [len(stream.source) // self.batch for stream in self.streams]
        return {size: n / sum(counts) for size, n in zip(self.sizes, counts, strict=True)}

    def told(self) -> str:
        """The shares, in a line."""
        shares = ", ".join(f"{h}x{w} {share:.1%}" for (h, w), share in self.shares().items())
        return f"buckets (height x width): {shares} of the samples"


def bucketed(
    source: records.Source,
    *,
    buckets: Sequence[Size],
    batch: int,
    seed: int,
    members: Int[np.ndarray, " n"],
    **options: Any,
) -> Bucketed:
    """Batches of one bucket each; `members` is the bucket of every record, and `options` are those of `batches`.

    Raises:
      ValueError: a bucket with fewer pictures than a batch, or what `batches` refuses.
    """
    streams = []
    for i, (h, w) in enumerate(buckets):
        numbers = np.flatnonzero(members == i)
        if len(numbers) < batch:
            raise ValueError(
                f"the bucket {h}x{w} (height x width) has {len(numbers)} pictures of {source.name}, fewer than a batch "
                f"of {batch}; leave it out of data.buckets, or make the batch smaller"
            )
        drawn = pipeline.seed_of((seed, i))  # buckets are not to be cut and mirrored alike
        streams.append(
            pipeline.batches(part(source, numbers), batch=batch, size=(h, w), seed=drawn, **options)
        )
    one = streams[0]
    return Bucketed(
        source=source,
        sizes=tuple(buckets),
        streams=tuple(streams),
        batch=batch,
        seed=seed,
        workers=one.workers,
        prefetch=one.prefetch,
        max_bad_rate=one.max_bad_rate,
    )
