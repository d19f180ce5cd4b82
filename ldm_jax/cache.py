"""Encodes the data of a diffusion model once, so that training need not do so in every step.

    python -m ldm_jax.cache --config configs/demo.py --out runs/demo/latents
    python train.py --config configs/demo.py --workdir runs/demo/model --config.data.cached=runs/demo/latents

Reads the config's data as centre crops (random ones cannot be encoded beforehand) and writes, for training and for
validation, the mean and the log-variance of the autoencoder's posterior, from which each epoch samples anew; of the
mirror images too where `data.flip` is set; and captions, labels and what else the config's conditioner reads. With
`data.buckets` each picture of training has the size of its bucket. The same command goes on where it was interrupted.
Several processes share the work if each is told its number: no two of them need to know each other, nor to run at the
same time.
"""

import collections
import contextlib
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import numpy as np
from absl import flags
from ml_collections import config_flags
from tqdm import tqdm

from ldm_jax import cli
from ldm_jax.data import examples, latents, pipeline, records

THREADS = 16  # that read, where no worker processes do

FLAGS = flags.FlagValues()
CONFIG = config_flags.DEFINE_config_file(
    "config", None, "a diffusion model: a file in configs/", flag_values=FLAGS, lock_config=True
)
OUT = flags.DEFINE_string("out", None, "the folder of the cache", flag_values=FLAGS)
SPLIT = flags.DEFINE_enum(
    "split", "both", ("both", "train", "validation"), "what to encode", flag_values=FLAGS
)
ROWS = flags.DEFINE_integer(
    "batch", 64, "pictures encoded at once; mirror images count", lower_bound=1, flag_values=FLAGS
)
SHARD = flags.DEFINE_integer("shard", 4096, "pictures of a file", lower_bound=1, flag_values=FLAGS)
DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ("float32", "float16"), "of what is stored", flag_values=FLAGS
)
PROCESS = flags.DEFINE_integer(
    "process_id", 0, "of the processes that share the work, this one", 0, flag_values=FLAGS
)
PROCESSES = flags.DEFINE_integer(
    "num_processes", 1, "how many processes share the work", 1, flag_values=FLAGS
)


def main(argv: list[str]) -> None:
    cli.compile_cache()
    with cli.plain_errors():
        cli.nothing_more(argv, "a config value is set by --config.NAME=VALUE")
        cli.required(CONFIG, OUT)
        if PROCESS.value >= PROCESSES.value:
            raise ValueError(
                f"--process_id={PROCESS.value} is none of {PROCESSES.value} processes, which count from 0"
            )
        from ldm_jax.build import encoding, parts

        splits = parts.SPLITS if SPLIT.value == "both" else (SPLIT.value,)
        options = (SHARD.value, DTYPE.value, ROWS.value)
        jobs = {s: encoding.job(CONFIG.value, OUT.value, s, *options) for s in splits}
    for split, job in jobs.items():
        try:
            write(job, Path(OUT.value), split, PROCESS.value, PROCESSES.value)
        except (ValueError, OSError) as error:  # of the data
            cli.fail(str(error))


def write(job: Any, out: Path, split: str, process: int = 0, processes: int = 1) -> None:
    """Writes the shards of a split that are this process's and not there yet."""
    out.mkdir(parents=True, exist_ok=True)
    latents.write_plan(out, split, job.plan)
    paths = latents.shards(out, split, job.plan)
    mine = range(process, len(paths), processes)
    todo = [k for k in mine if not paths[k].is_file()]
    sizes = {k: len(latents.numbers_of(job.plan, k)) for k in mine}
    done = sum(sizes[k] for k in mine if k not in todo)
    numbers = [i for k in todo for i in latents.numbers_of(job.plan, k)]
    bar = tqdm(total=sum(sizes.values()), initial=done, unit="picture", desc=split)
    with bar, contextlib.closing(read(job, numbers)) as rows:
        for k in todo:
            latents.write_shard(paths[k], encoded(job, itertools.islice(rows, sizes[k]), bar))
    print(out / f"{split}.json")


def read(job: Any, numbers: list[int]) -> Iterator[dict[str, Any]]:
    """What is to be encoded, read ahead; records that cannot be read are counted and named.

    Raises:
      ValueError: there are too many of those.
    """
    bad = records.BadRecords(job.source, job.max_bad_rate)
    if not numbers:
        return
    of = grain.MapDataset.source(job.views(numbers))
    with contextlib.closing(pipeline.ahead(of, job.workers, 2 * job.rows, THREADS)) as rows:
        for row in rows:
            bad.add(np.array([row.pop("_bad")]))
            yield row
    bad.tell()


def encoded(job: Any, rows: Iterator[dict[str, Any]], bar: Any) -> Iterator[dict[str, Any]]:
    """The records of these views; while the device encodes some, those before them are written."""
    at_once = max(job.rows // job.plan.flips, 1)
    running = collections.deque()

    def finish():
        some, moments = running.popleft()
        moments = np.asarray(moments)[: len(some) * job.plan.flips]
        moments = moments.reshape(len(some), job.plan.flips, *moments.shape[1:])
        texts = iter(texts_of(job, some))
        for row, of_row in zip(some, moments, strict=True):
            fields = {k: v for k, v in row.items() if k != "x"} | next(texts)
            yield fields | {latents.MOMENTS: of_row.astype(job.plan.dtype)}
        bar.update(len(some))

    for _, alike in itertools.groupby(rows, lambda row: row["x"].shape):
        while some := list(itertools.islice(alike, at_once)):
            x = np.concatenate([row["x"] for row in some])
            # The last ones are filled up, so that one program encodes all of a size.
            filled = np.resize(x, (job.rows, *x.shape[1:]))
            running.append((some, job.encode(filled)))
            if len(running) > 1:
                yield from finish()
    while running:
        yield from finish()


def texts_of(job: Any, rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """For each row, what the text encoders make of its captions: one or more."""
    if job.encode_texts is None:
        yield from ({} for _ in rows)
        return
    captions = [examples.captions_of(row) for row in rows]
    made = job.encode_texts(list(itertools.chain.from_iterable(captions)))
    first = 0
    for some in captions:
        yield {k: v[first : first + len(some)].astype(job.plan.dtype) for k, v in made.items()}
        first += len(some)


if __name__ == "__main__":
    cli.run(main, FLAGS)
    sys.exit(0)
