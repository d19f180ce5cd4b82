"""Records: what a source of them is, and what is done about those that cannot be shown or do not fit.

A record that cannot be shown is replaced by the next one that can; `BadRecords` counts and names it on the host.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from absl import logging

from ldm_jax.data import transforms

MAX_BAD_RATE = 0.01
_PATIENCE = 100  # so many unreadable records in a row are no accident


@runtime_checkable
class Source(Protocol):
    """Records by number; picklable, for worker processes."""

    name: str
    fingerprint: str  # changes when the records do
    classes: tuple[str, ...] | None  # names of the labels

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`image`: encoded bytes or uint8 [h w c]; `caption`: one text or more; `label`; others."""

    @property
    def fields(self) -> tuple[str, ...]:
        """The names in every record."""

    def only(self, fields: Sequence[str]) -> "Source":
        """The same records, of which only these fields are needed."""

    def name_of(self, index: int) -> str:
        """How to call a record in a message."""

    def captions(self) -> Iterator[str]:
        """All captions, without reading the pictures."""


def readable(
    source: Source, index: int, shown: Callable[[dict[str, Any]], dict[str, Any]]
) -> tuple[int, dict[str, Any]]:
    """What is shown of a record, or of the next one that can be shown; and the number of that.

    Raises:
      ValueError: a hundred records in a row cannot be.
    """
    reasons = []
    for offset in range(min(_PATIENCE, len(source))):
        at = (index + offset) % len(source)
        try:
            return at, shown(source[at])
        except (transforms.BadImage, OSError) as error:  # OSError: a file that has gone
            reasons.append(error)
    raise ValueError(
        f"{len(reasons)} records of {source.name} in a row cannot be read, the first is "
        f"{source.name_of(index)}: {reasons[0]}; repair or remove them"
    )


class BadRecords:
    """Counts the records that were replaced, names each once, and stops a run that has too many.

    The limit is `max_rate` plus three standard deviations of chance, and nothing is judged before
    100 records were seen. With several processes each one judges what it has read itself.
    """

    def __init__(self, source: Source, max_rate: float):
        self.source, self.max_rate = source, max_rate
        self.seen = self.bad = 0
        self.named: dict[int, str] = {}

    def add(self, replaced: np.ndarray) -> None:
        """Take note of the `_bad` of a batch.

        Raises:
          ValueError: above the limit.
        """
        self.seen += len(replaced)
        for index in replaced[replaced >= 0].tolist():
            self.bad += 1
            if index not in self.named:
                self.named[index] = f"{self.source.name_of(index)}: {self._reason(index)}"
                logging.warning("replaced by the next record: %s", self.named[index])
        limit = self.max_rate * self.seen + 3 * (self.max_rate * self.seen) ** 0.5
        if self.seen >= 100 and self.bad > limit:
            raise ValueError(
                f"{self.bad} of {self.seen} records of {self.source.name} could not be read, "
                f"more than max_bad_rate={self.max_rate:g}; the first is "
                f"{next(iter(self.named.values()))}; "
                "repair or remove them, or raise the rate"
            )

    def tell(self) -> None:
        """How many there were, in the end; nothing where there were none."""
        if self.bad:
            of = self.source.name
            logging.warning(
                "%d of %d records of %s were replaced by others", self.bad, self.seen, of
            )

    def _reason(self, index: int) -> str:
        try:
            transforms.decode(self.source[index]["image"])
        except (transforms.BadImage, OSError) as error:
            return str(error)
        return "does not fit its other fields"


def check_classes(
    name: str, values: np.ndarray, known: range, source: Source, at: Sequence[int]
) -> None:
    """Looks whether all numbers of a field are of classes that there are.

    Raises:
      ValueError: the first record in which one is not.
    """
    for row, index in zip(values, at, strict=True):
        if row.min() < known.start or row.max() >= known.stop:
            wrong = row[(row < known.start) | (row >= known.stop)].flat[0]
            raise ValueError(
                f"{source.name_of(index)} has the class {wrong} in its field {name!r}, and the conditioner has "
                f"{known.stop} classes (0 to {known.stop - 1}); correct the data, or give the conditioner as many as "
                "there are"
            )


def numbers(name: str, values: list[Any], source: Source) -> np.ndarray:
    """int32 or float32 [b ...]; numbers may be written as text, as in a csv file."""
    try:
        array = np.stack([np.asarray(value) for value in values])
        if array.dtype.kind not in "iub":
            array = array.astype(np.float32)
        if name == "label" or array.dtype.kind in "iub":
            whole = array.astype(np.int32)
            if (whole != array).any():
                raise ValueError("not whole numbers of 32 bits")
            array = whole
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the field {name!r} of {source.name} is not a number, or an array of one shape, in "
            f"every record ({error}); leave it out of fields"
        ) from error
    return array
