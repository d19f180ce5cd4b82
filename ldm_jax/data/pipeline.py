"""The one input pipeline: from any source to batches, as a pure function of the step.

Position `p = step * batch + j` of the global stream decides everything about example j of a step:
the record (a new permutation of the source in each epoch) and the randomness of its augmentation (a
generator keyed by the seed and p). A process computes its contiguous block of the global batch, so
the batch does not depend on the number of processes, nor on workers, nor on where a run was
resumed. grain only computes steps ahead of time, in threads or in worker processes.

A record that cannot be shown is replaced by the next one that can (`records`). The batch says so (`_bad`),
since it may come from a worker process.
"""

import contextlib
import functools
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import grain
import numpy as np
from absl import flags

from ldm_jax.data import tokenizer as text
from ldm_jax.data.examples import BOXES, LAYOUT, MADE, SMALL, Making, Show, picture
from ldm_jax.data.layout import Layout
from ldm_jax.data.records import MAX_BAD_RATE, BadRecords, Source, check_classes, numbers, readable

Rows = Callable[[Sequence[str]], np.ndarray]  # captions -> rows of numbers; picklable, for workers


@dataclass(frozen=True)
class Batches:
    """`self[step]` is the batch of a step, as arrays of this process; see `batches`."""

    source: Source
    batch: int
    seed: int
    show: Show = field(repr=False)
    fields: tuple[str, ...]
    texts: tuple[tuple[str, Rows], ...] = field(repr=False)
    classes: Mapping[str, range]
    process_index: int
    process_count: int
    workers: int
    prefetch: int
    max_bad_rate: float
    shuffle: bool
    repeat: bool

    def __len__(self) -> int:
        """The number of steps."""
        return sys.maxsize if self.repeat else len(self.source) // self.batch

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        """The batch of a step; `_bad` [b] is the number of the record that was replaced, or -1."""
        examples = self._examples(step)
        out = {"x": np.stack([example["x"] for example in examples])}
        for name in self.fields:
            out[name] = numbers(name, [example[name] for example in examples], self.source)
            if name in self.classes:
                at = [example["index"] for example in examples]
                check_classes(name, out[name], self.classes[name], self.source, at)
        for name, rows in self.texts:
            out[name] = rows([example["caption"] for example in examples])
        out["_bad"] = np.array([example["_bad"] for example in examples], np.int64)
        return out

    def iterate(
        self, start_step: int = 0, bad: BadRecords | None = None
    ) -> Iterator[dict[str, np.ndarray]]:
        """The batches from a step on, computed ahead, without `_bad`: that goes to `bad`.

        Raises:
          ValueError: more records than `max_bad_rate` cannot be read.
        """
        return iterate(self, start_step, bad)

    def records(self, step: int) -> list[dict[str, Any]]:
        """The raw records of a step, those that replace unreadable ones included."""
        return [self.source[example["index"]] for example in self._examples(step)]

    def captions(self, step: int) -> list[str]:
        """The captions of a step: the texts behind `tokens`.

        Raises:
          ValueError: the source has none.
        """
        if "caption" not in self.source.fields:
            raise ValueError(f"{self.source.name} has no captions; it has {self.source.fields}")
        return [example["caption"] for example in self._examples(step)]

    def _examples(self, step: int) -> list[dict[str, Any]]:
        if not 0 <= step < len(self):
            raise IndexError(
                f"there are {len(self)} steps of {self.batch} in {self.source.name}, not {step}"
            )
        share = self.batch // self.process_count
        first = step * self.batch + self.process_index * share
        order = grain.MapDataset.range(len(self.source))
        if self.shuffle:
            order = order.shuffle(seed=seed_of(self.seed))
        return [self._example(int(order[p]), p) for p in range(first, first + share)]

    def _example(self, index: int, position: int) -> dict[str, Any]:
        def shown(record):
            return self.show(record, self.fields, np.random.default_rng((self.seed, position)))

        at, example = readable(self.source, index, shown)
        return example | {"index": at, "_bad": -1 if at == index else index}


def iterate(
    of: Any, start_step: int, bad: BadRecords | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """The batches of `of`, a `Batches` or what is like one, as `Batches.iterate` has them."""
    bad = BadRecords(of.source, of.max_bad_rate) if bad is None else bad
    steps = grain.MapDataset.source(of)[start_step:]
    with contextlib.closing(ahead(steps, of.workers, of.prefetch, of.prefetch)) as batches_:
        try:
            for out in batches_:
                bad.add(out.pop("_bad"))
                yield out
        finally:
            bad.tell()


def seed_of(seed: int | Sequence[int]) -> int:
    """A seed for grain, which adds the epoch to it; hashed, seed 1 is not seed 0 later on."""
    return int(np.random.SeedSequence(seed).generate_state(1)[0])


def ahead(of: grain.MapDataset, workers: int, prefetch: int, threads: int) -> Iterator[Any]:
    """The elements in order, `prefetch` of them computed ahead: in threads, or in each worker process."""
    reading = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    elements = of.to_iter_dataset(reading)
    if workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain reads its own: outside of absl, the defaults
        options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=prefetch)
        elements = elements.mp_prefetch(options, worker_init_fn=_end_with_parent)
    elements = iter(elements)
    try:
        yield from elements
    finally:
        elements.close()


def _end_with_parent(index: int, count: int) -> None:
    """In a worker process: it ends when the one that it reads for does, killed or not; grain's own goes on for ever."""
    parent = multiprocessing.parent_process()

    def wait():
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def batches(
    source: Source,
    *,
    batch: int,
    size: int | Sequence[int],
    seed: int,
    crop: str = "center",
    flip: bool = False,
    fields: Sequence[str] = (),
    tokenizer: Any = None,
    length: int = 77,
    texts: Mapping[str, Rows] | None = None,
    show: Show | None = None,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
    prefetch: int = 2,
    max_bad_rate: float = MAX_BAD_RATE,
    shuffle: bool = True,
    repeat: bool = True,
    shrink: int = 1,
    degradation: str = "bicubic",
    holes: Sequence[str] = ("boxes",),
    layout: Mapping[str, Any] | None = None,
    classes: Mapping[str, range] | None = None,
) -> Batches:
    """Batches with `x`: float32 [b h w 3] in [-1, 1], `tokens`: int32 [b length], and `fields`.

    Args:
      batch: pictures in the global batch; each process computes `batch / process_count` of them.
      size: the side, or (h, w).
      crop: "center" or "random"; `flip`: mirror every second picture at random.
      fields: what else to take from the records: "label" (int32 [b]), "segmentation" (int32 [b h w
        1], cut and mirrored with the picture), any field of numbers (int32 or float32 [b ...]), or
        what is made here: "sizes" (float32 [b 6], see `transforms.sizes`), "small" (float32 [b h/shrink w/shrink
        3] in [-1, 1]), the picture made smaller by `shrink` and `degradation`, "hole" (float32 [b h w 1]), a mask of
        one of the kinds `holes`, and "layout" (int32 [b n]), boxes as tokens by the arguments of `Layout` in `layout`.
      tokenizer: with it, `tokens` are the captions in `length` numbers.
      texts: further fields of this kind, with functions that make such rows of captions.
      show: what an example is of a record; None: `picture`, by size, crop and flip.
      workers: worker processes; 0 means threads of this one.
      prefetch: how many batches to compute ahead (in each worker).
      max_bad_rate: the share of unreadable records above which `iterate` stops.
      classes: for fields of class numbers, those that are known.
      repeat: without it there are `len(source) // batch` steps; the rest of the epoch is left out.

    Raises:
      ValueError: sizes that do not fit each other, or a field that the source does not have.
    """
    height_width = (size, size) if isinstance(size, int) else tuple(size)
    if len(height_width) != 2 or min(height_width) < 1:
        raise ValueError(f"size={size!r} is neither a side in pixels nor (height, width)")
    if crop not in ("center", "random"):
        raise ValueError(f"unknown crop {crop!r}; choose 'center' or 'random'")
    if batch < 1 or batch > len(source):
        raise ValueError(
            f"a batch of {batch} cannot be drawn from the {len(source)} records of {source.name}; "
            f"choose a batch from 1 to {len(source)}"
        )
    if batch % process_count or not 0 <= process_index < process_count:
        raise ValueError(
            f"a batch of {batch} cannot be shared by {process_count} processes (this is number "
            f"{process_index}); choose a multiple of {process_count}"
        )
    if seed < 0 or workers < 0 or prefetch < 1:
        raise ValueError(
            f"seed={seed}, workers={workers}, prefetch={prefetch}: at least 0, 0 and 1"
        )
    texts = dict(texts or {})
    if tokenizer is not None:
        text.null_ids(tokenizer, length)  # raises where there is no room
        texts["tokens"] = functools.partial(text.encode, tokenizer, length=length)
    if "tokens" in fields and "tokens" not in texts:
        raise ValueError("the field 'tokens' needs a tokenizer; train one on source.captions()")
    fields = tuple(name for name in fields if name not in texts)
    if SMALL in fields and (shrink < 2 or any(n % shrink for n in height_width)):
        raise ValueError(
            f"the field {SMALL!r} is a picture of {height_width} made smaller by shrink={shrink}; "
            "give data.shrink, a whole number from 2 on that divides both sides"
        )
    if LAYOUT in fields and layout is None:
        raise ValueError(
            f"the field {LAYOUT!r} is made of boxes by the section data.layout; give its classes, objects and vocab"
        )
    making = Making(shrink, degradation, tuple(holes), layout and Layout(**layout))
    stored = tuple(name for name in fields if name not in MADE or show is not None)
    if LAYOUT in fields and show is None:
        stored = (*stored, BOXES)
    absent = [name for name in stored if name not in source.fields]
    if absent:
        raise ValueError(
            f"{source.name} has no field {absent[0]!r}; its fields are {source.fields}"
        )
    if texts and "caption" not in source.fields:
        raise ValueError(
            f"{source.name} has no captions to make tokens of; its fields are {source.fields}"
        )
    return Batches(
        source=source.only(("image", "caption", *stored)),
        batch=batch,
        seed=seed,
        show=show
        or functools.partial(picture, size=height_width, crop=crop, flip=flip, making=making),
        fields=fields,
        texts=tuple(texts.items()),
        classes=dict(classes or {}),
        process_index=process_index,
        process_count=process_count,
        workers=workers,
        prefetch=prefetch,
        max_bad_rate=max_bad_rate,
        shuffle=shuffle,
        repeat=repeat,
    )
