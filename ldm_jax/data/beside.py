"""Records of a folder of pictures, each with one more field that lies elsewhere."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ldm_jax.data import folder as folders


@dataclass(frozen=True, eq=False)
class Beside:
    """A `records.Source`: what `of` has, and the field `adds`, which `read(index)` makes; picklable if that is."""

    of: folders.Folder
    name: str
    fingerprint: str
    adds: str  # the field
    read: Callable[[int], Any] = field(repr=False)

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
        return self if self.adds in fields else self.of.only(fields)

    def name_of(self, index: int) -> str:
        return self.of.name_of(index)

    def captions(self) -> Iterator[str]:
        return self.of.captions()
