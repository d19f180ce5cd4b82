"""The words of the data set, and the two worlds that are made of them.

Constants only, so that the reader of pictures can share the palette without sharing any code that
draws. Every colour has a hue of its own, at least 20 degrees from its neighbours, and every
background is grey: saturation separates object from background, and hue separates the objects.

Each world holds out some (colour, shape) pairs, one per shape and no two of one colour (a partial
Latin square): train and validation never contain them, but contain their colours and their shapes
often. Only a model that has learnt to compose paints them right.
"""

from typing import NamedTuple

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 48, 44),
    "green": (52, 168, 72),
    "blue": (48, 84, 220),
    "yellow": (245, 225, 55),
    "purple": (150, 60, 205),
    "cyan": (60, 205, 220),
    "orange": (240, 120, 25),
    "pink": (250, 120, 190),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
SIZES = ("small", "medium", "large")
BACKDROPS = ("plain", "striped", "checkered", "shaded", "grainy")
TRAIN_SIMPLE = (
    24_000  # pictures; the demo's training time depends on it little, its preparation time does
)


class World(NamedTuple):
    """What a config can contain, and how much of it is made."""

    name: str
    side: int  # pixels
    shapes: tuple[str, ...]
    colours: tuple[str, ...]
    radii: dict[str, float]  # size word -> half the width of an object, in pixels
    most: int  # objects in a picture
    held_out: frozenset[tuple[str, str]]  # (colour, shape) pairs that only `unseen` contains
    splits: dict[str, int]  # split -> number of pictures

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        return tuple((colour, shape) for colour in self.colours for shape in self.shapes)

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes: "red circle", "red square", ..., colour by colour."""
        return tuple(f"{colour} {shape}" for colour, shape in self.pairs)


SIMPLE = World(
    name="simple",
    side=32,
    shapes=("square", "triangle", "cross"),  # far apart at this size; a circle is nearly a square
    colours=tuple(COLOURS)[:6],
    radii={"small": 5.5, "large": 7.5},
    most=2,
    held_out=frozenset({("red", "triangle"), ("blue", "cross"), ("yellow", "square")}),
    splits={"train": TRAIN_SIMPLE, "validation": 1_000, "unseen": 1_000},
)
SCENES = World(
    name="scenes",
    side=64,
    shapes=SHAPES,
    colours=tuple(COLOURS),
    radii={"small": 7.0, "medium": 10.0, "large": 14.0},
    most=3,
    held_out=frozenset(
        {
            ("blue", "circle"),
            ("yellow", "square"),
            ("red", "triangle"),
            ("green", "star"),
            ("pink", "cross"),
            ("orange", "diamond"),
        }
    ),
    splits={"train": 60_000, "validation": 2_000, "unseen": 2_000},
)
WORLDS = {w.name: w for w in (SIMPLE, SCENES)}


def world(name: str) -> World:
    """The world of that name.

    Raises:
      ValueError: no such world.
    """
    if name not in WORLDS:
        raise ValueError(f"shapes has no config {name!r}; choose one of {sorted(WORLDS)}")
    return WORLDS[name]
