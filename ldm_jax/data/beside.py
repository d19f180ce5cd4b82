"""Records of pictures, each with one more field that lies elsewhere."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ldm_jax.data.records import Source


@dataclass(frozen=True, eq=False)
class Beside:
    """A `records.Source`: what `of` has, and the field `adds`, which `read(index)` makes; picklable if that is."""

    of: Source
    name: str
    fingerprint: str
    adds: str  # the field
    read: Callable[[int], Any] = field(repr=False)
    # The pictures, encoded, that the field was made of, where it was made of pictures.
    made_of: Callable[[int], Sequence[bytes]] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.of)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.of[index] | {self.adds: self.read(index)}

    @property
    def classes(self) -> tuple[str, ...] | None:
        return self.of.classes

    @property
    def fields(self) -> tuple[str, ...]:
        return (*self.of.fields, self.adds)

    def only(self, fields: Sequence[str]) -> Any:
        """The same records, without the field where it is not asked for."""
        of = self.of.only(fields)
        return replace(self, of=of) if self.adds in fields else of

    def name_of(self, index: int) -> str:
        return self.of.name_of(index)

    def captions(self) -> Iterator[str]:
        return self.of.captions()
