"""Any prepared TensorFlow data set as a random-access source, without tensorflow.

A prepared data set describes itself: `<data_dir>/<name>[/<config>]/<version>` holds
`dataset_info.json`, `features.json` and array_record files, so neither the code that prepared it
nor tensorflow is needed to read it. Pictures stay encoded; only the features that are asked for are
parsed, which is most of the time.
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tensorflow_datasets
from etils import epath
from tensorflow_datasets import features as kinds

AT_ONCE = 1024  # records that are read together, where all are: many times as fast as one by one


@dataclass(frozen=True)
class Prepared:
    """A split of a prepared data set by number; see `tfds`."""

    name: str
    fingerprint: str
    directory: str
    split: str
    length: int
    features: tuple[tuple[str, str], ...]  # (our name, theirs)
    classes: tuple[str, ...] | None = None
    kinds: tuple[tuple[str, tuple[str, ...]], ...] = ()  # of boxes: names of each entry's values

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.length:
            raise IndexError(f"{self.name} has {self.length} records, there is no number {index}")
        records, parse = self._opened()
        return parse(records[index])

    def _opened(self) -> tuple[Any, Callable[[bytes], dict[str, Any]]]:
        """The records as bytes, and what makes fields of one."""
        theirs = tuple(name for _, name in self.features)
        records, parser, encoded, texts = _open(self.directory, self.split, theirs)

        def parse(record):
            parsed = parser.deserialize_example_np(record, decoders=encoded)
            return {
                ours: _text(_at(parsed, name)) if name in texts else _at(parsed, name)
                for ours, name in self.features
            }

        return records, parse

    @property
    def fields(self) -> tuple[str, ...]:
        return tuple(ours for ours, _ in self.features)

    def only(self, fields: Sequence[str]) -> "Prepared":
        """The same records without the other fields: faster to read."""
        return replace(self, features=tuple(pair for pair in self.features if pair[0] in fields))

    def name_of(self, index: int) -> str:
        return f"record {index} of {self.name}"

    def captions(self) -> Iterator[str]:
        texts = self.only(("caption",))
        if not texts.features:
            return
        records, parse = texts._opened()
        for first in range(0, len(self), AT_ONCE):
            rows = range(first, min(first + AT_ONCE, len(self)))
            for record in records.__getitems__(rows):
                caption = parse(record)["caption"]
                yield from [caption] if isinstance(caption, str) else caption


def tfds(
    dataset: str,
    data_dir: str | os.PathLike,
    split: str = "train",
    *,
    image: str = "image",
    caption: str | None = None,
    label: str | None = None,
) -> Prepared:
    """A data set that has been prepared below `data_dir` (tensorflow-datasets, array_record files).

    Args:
      dataset: "cifar10", "cifar10:3.0.2" or "shapes/simple"; without a version the newest one.
      split: as "train", "train[:50%]", "train+test".
      image, caption, label: the features that play these parts; "captions/text" names a feature
        inside another one. A feature that is already called "caption" or "label" need not be named.
        A sequence of texts means that one is chosen at random.

    Raises:
      FileNotFoundError: not prepared; the message has the command that does it.
      ValueError: unknown split or feature, or a file format without random access.
    """
    directory = _directory(dataset, epath.Path(os.path.expanduser(data_dir)))
    info = tensorflow_datasets.builder_from_directory(str(directory)).info
    title = f"{info.full_name} ({split})"
    if info.file_format is None or info.file_format.value != "array_record":
        raise ValueError(
            f"{title} is stored as {info.file_format and info.file_format.value}, which has no "
            f"random access; remove {str(directory)!r} and prepare it again: "
            f"{_command(dataset, data_dir)}"
        )
    try:
        chosen = info.splits[split]
        length = chosen.num_examples
        instructions = chosen.file_instructions if length else []
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{info.full_name} has no split {split!r}; choose one of {sorted(info.splits)}, or "
            "a slice such as 'train[:50%]'"
        ) from error
    if not length:
        raise ValueError(f"{title} is empty; choose a larger slice")
    absent = [part.filename for part in instructions if not epath.Path(part.filename).exists()]
    if absent:
        raise FileNotFoundError(
            f"{len(absent)} files of {title} are missing, the first is {absent[0]!r}; "
            f"prepare it again: {_command(dataset, data_dir)}"
        )

    names = {key: key for key in sorted(info.features)}
    parts = {"image": image, "caption": caption, "label": label}
    names |= {ours: theirs for ours, theirs in parts.items() if theirs is not None}
    found = {
        ours: _feature(info.full_name, info.features, theirs) for ours, theirs in names.items()
    }
    if "caption" in found and not _is_text(found["caption"]):
        raise ValueError(
            f"the caption feature {names['caption']!r} of {info.full_name} is no text but "
            f"{found['caption']}; name another one with caption"
        )
    classes = found["label"].names if isinstance(found.get("label"), kinds.ClassLabel) else None
    of_boxes = getattr(found.get("boxes"), "feature", {})
    named = [(k, of.names) for k, of in of_boxes.items() if isinstance(of, kinds.ClassLabel)]
    listing = [
        [os.path.basename(part.filename), part.skip, part.take, part.examples_in_shard]
        for part in instructions
    ]
    identity = json.dumps([info.full_name, split, listing, info.features.to_json()], sort_keys=True)
    return Prepared(
        name=title,
        fingerprint=hashlib.sha256(identity.encode()).hexdigest(),
        directory=str(directory),
        split=split,
        length=length,
        features=tuple(names.items()),
        classes=tuple(classes) if classes else None,
        kinds=tuple((name, tuple(names)) for name, names in named),
    )


def names(of: Prepared) -> tuple[str, ...]:
    """Which records of the data set these are: "train/0", "train/1" ..., whatever slices they were named by."""
    splits = tensorflow_datasets.builder_from_directory(of.directory).info.splits
    parts = tensorflow_datasets.core.ReadInstruction.from_spec(of.split).to_absolute(splits)
    return tuple(
        f"{part.splitname}/{i}"
        for part in parts
        for i in range(
            part.from_ or 0,
            splits[part.splitname].num_examples if part.to is None else part.to,
        )
    )


@functools.lru_cache(maxsize=16)
def _open(directory: str, split: str, names: tuple[str, ...]) -> tuple[Any, Any, dict, set[str]]:
    """(records as bytes, parser of these features, decoders that leave pictures encoded, texts)."""
    builder = tensorflow_datasets.builder_from_directory(directory)
    raw = tensorflow_datasets.decode.DeserializeMethod.RAW_BYTES
    records = builder.as_data_source(split, deserialize_method=raw)
    features = builder.info.features
    wanted = {key: features[key] for key in dict.fromkeys(name.split("/")[0] for name in names)}
    skip = tensorflow_datasets.decode.SkipDecoding
    encoded = {key: skip() for key, kind in wanted.items() if isinstance(kind, kinds.Image)}
    texts = {name for name in names if _is_text(_feature(directory, features, name))}
    return records, kinds.FeaturesDict(wanted), encoded, texts


def _directory(name: str, data_dir: epath.Path) -> epath.Path:
    base, _, version = name.partition(":")
    root = data_dir / base / version if version else data_dir / base
    if _prepared(root):
        return root
    below = [path for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    versions = [path for path in below if _prepared(path)]
    if versions:
        return max(
            versions, key=lambda path: [int(n) if n.isdigit() else -1 for n in path.name.split(".")]
        )
    configs = sorted(path.name for path in below if any(map(_prepared, path.iterdir())))
    if configs:
        raise ValueError(
            f"{base!r} has the configs {configs}; name one of them, as '{base}/{configs[0]}'"
        )
    raise FileNotFoundError(
        f"{name!r} is not prepared in {str(data_dir)!r}; prepare it with: "
        f"{_command(name, data_dir)}"
    )


def _prepared(path: epath.Path) -> bool:
    return path.is_dir() and (path / "dataset_info.json").exists()


def _command(name: str, data_dir: Any) -> str:
    base, _, config = name.partition(":")[0].partition("/")
    if base == "shapes":
        return f"python -m ldm_jax.data.shapes --data_dir {data_dir} --config {config or 'simple'}"
    return (
        f"tfds build {name} --data_dir {data_dir} --file_format array_record "
        "(that needs tensorflow: pip install 'ldm_jax[prepare]')"
    )


def _feature(title: str, features: Any, name: str) -> Any:
    feature = features
    for key in name.split("/"):
        feature = feature.feature if isinstance(feature, kinds.Sequence) else feature
        if not isinstance(feature, kinds.FeaturesDict) or key not in feature:
            raise ValueError(
                f"{title} has no feature {name!r}; its features are {sorted(features)}"
            )
        feature = feature[key]
    return feature


def _is_text(feature: Any) -> bool:
    feature = feature.feature if isinstance(feature, kinds.Sequence) else feature
    return isinstance(feature, kinds.Tensor) and np.dtype(feature.np_dtype).kind == "O"


def _at(record: Any, name: str) -> Any:
    for key in name.split("/"):
        record = record[key]
    return record


def _text(value: Any) -> str | list[str]:
    return value.decode(errors="replace") if isinstance(value, bytes) else [_text(v) for v in value]
