"""What is in a picture: a random scene as a pure function of (world, split, index).

Rules that every scene keeps, so that a picture can be read back without doubt:
- no two things share both colour and shape, and things closer than 3 pixels differ in colour;
- at most 15 % of a thing is hidden, and what is seen of it is in one piece;
- `unseen` scenes have a held-out (colour, shape) pair, the other splits have none.

Candidates are drawn until one keeps them. In `simple` a single thing stands at the left, right,
top, bottom or in the middle, and two things stand side by side or one above the other; in `scenes`
things stand anywhere.
"""

import itertools
import zlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from scipy import ndimage

from ldm_jax.data.shapes import draw, vocabulary
from ldm_jax.data.shapes.draw import Backdrop, Scene, Thing
from ldm_jax.data.shapes.vocabulary import World

T = TypeVar("T")
MOST_HIDDEN = 0.15  # of the area of a thing
LEAST_GAP = 3.0  # pixels between the boxes of two things of one colour
NEAR_LEFT, NEAR_RIGHT = 0.28, 0.72  # where things of `simple` stand, as a part of the side
OVERLAPPING = 0.3  # the part of the scenes with several things in which two are pushed together


def generator(world: World, split: str, index: int, use: int = 0) -> np.random.Generator:
    """The randomness of one picture; `use` tells independent streams apart.

    Raises:
      ValueError: an unknown split.
    """
    if split not in world.splits:
        raise ValueError(
            f"shapes/{world.name} has no split {split!r}; choose one of {sorted(world.splits)}"
        )
    return np.random.default_rng([zlib.crc32(f"{world.name}/{split}".encode()), index, use])


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """A uniform choice; `Generator.choice` is ten times slower."""
    return options[int(rng.random() * len(options))]


def sample(world: World, split: str, index: int) -> Scene:
    """The scene of one picture; things are in the order in which they are painted."""
    rng = generator(world, split, index)
    behind = backdrop(world, rng)
    count = 1 + int(rng.random() * world.most)
    while True:
        things = arrange(world, kinds(world, split, count, rng), rng)
        if readable(things, world.side):
            return Scene(world.side, behind, things)


def kinds(world: World, split: str, count: int, rng: np.random.Generator) -> list[tuple[str, str]]:
    """`count` different (colour, shape) pairs of the split."""
    if split == "unseen":
        first = pick(rng, sorted(world.held_out))
        others = [pair for pair in world.pairs if pair != first]
    else:
        others = [pair for pair in world.pairs if pair not in world.held_out]
        first = pick(rng, others)
        others.remove(first)
    chosen = [first, *(others.pop(int(rng.random() * len(others))) for _ in range(count - 1))]
    if rng.random() < 0.5:  # a held-out pair may lie below or above the others
        chosen.reverse()
    return chosen


def backdrop(world: World, rng: np.random.Generator) -> Backdrop:
    kind = "plain" if rng.random() < 0.4 else pick(rng, vocabulary.BACKDROPS[1:])
    level = pick(rng, tuple(LEVELS.values())) + rng.uniform(-15, 15)
    contrast = {"plain": 0, "striped": 12, "checkered": 8, "shaded": 28, "grainy": 9}[kind]
    angle = {"striped": pick(rng, (0.0, 0.25, 0.5, 0.75)) * np.pi}.get(
        kind, rng.random() * 2 * np.pi
    )
    period = world.side / pick(rng, (4, 5, 6))
    return Backdrop(kind, level, contrast, period, angle, int(rng.random() * 2**31))


LEVELS = {"dark": 70.0, "middle": 125.0, "light": 180.0}


def arrange(
    world: World, pairs: Sequence[tuple[str, str]], rng: np.random.Generator
) -> tuple[Thing, ...]:
    """Sizes and places for the pairs, kept inside the picture."""
    sizes = [pick(rng, tuple(world.radii)) for _ in pairs]
    halves = [
        np.multiply(draw.HALF[shape], world.radii[size])
        for (_, shape), size in zip(pairs, sizes, strict=True)
    ]
    places = (stand if world.most == 2 else scatter)(world, halves, rng)
    things = []
    for (colour, shape), size, half, place in zip(pairs, sizes, halves, places, strict=True):
        y, x = np.clip(place, half + 0.3, world.side - half - 0.3)
        things.append(Thing(shape, colour, size, float(y), float(x), world.radii[size]))
    return tuple(things)


def stand(
    world: World, halves: Sequence[np.ndarray], rng: np.random.Generator
) -> list[tuple[float, float]]:
    """One thing at one of five places, or two along one axis: the places of `simple`, in pixels."""

    def around(centre, jitter):
        return world.side * (centre + (2 * rng.random() - 1) * jitter)

    if len(halves) == 1:
        y, x = pick(
            rng,
            ((0.5, 0.5), (0.5, NEAR_LEFT), (0.5, NEAR_RIGHT), (NEAR_LEFT, 0.5), (NEAR_RIGHT, 0.5)),
        )
        return [(around(y, 0.04), around(x, 0.04))]
    axis = int(rng.random() < 0.5)
    along = [around(NEAR_LEFT, 0.035), around(NEAR_RIGHT, 0.035)]
    if rng.random() < OVERLAPPING:
        gap = halves[0][axis] + halves[1][axis] - (0.5 + 2 * rng.random())
        along = [around(0.5, 0.03) - gap / 2]
        along.append(along[0] + gap)
    if rng.random() < 0.5:  # which of the two is painted last must not tell its place
        along.reverse()
    places = [(around(0.5, 0.07), a) for a in along]
    return places if axis == 1 else [(a, b) for b, a in places]


def scatter(
    world: World, halves: Sequence[np.ndarray], rng: np.random.Generator
) -> list[tuple[float, float]]:
    """Anywhere; sometimes the second thing is pushed against the first. In pixels."""
    places = [tuple(half + rng.random(2) * (world.side - 2 * half)) for half in halves]
    if len(halves) > 1 and rng.random() < OVERLAPPING:
        angle = rng.random() * 2 * np.pi
        reach = (halves[0] + halves[1]) * (0.7 + 0.25 * rng.random())
        step = reach * (np.sin(angle), np.cos(angle)) / max(abs(np.sin(angle)), abs(np.cos(angle)))
        places[1] = (places[0][0] + step[0], places[0][1] + step[1])
    return [(float(y), float(x)) for y, x in places]


def gap(a: Thing, b: Thing) -> float:
    """Pixels between the boxes of two things; negative when the boxes overlap."""
    p, q = draw.extent(a), draw.extent(b)
    return max(p[0] - q[2], q[0] - p[2], p[1] - q[3], q[1] - p[3])


def visible(things: Sequence[Thing], side: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each thing its whole mask, and the part of it that no later thing hides."""
    whole = [draw.coverage(thing, side) >= 0.5 for thing in things]
    above = np.zeros((side, side), bool)
    seen = []
    for mask in reversed(whole):
        seen.append(mask & ~above)
        above |= mask
    return list(zip(whole, reversed(seen), strict=True))


def readable(things: Sequence[Thing], side: int) -> bool:
    """Whether the scene keeps the rules on colours and overlap."""
    gaps = [(gap(a, b), a.colour == b.colour) for a, b in itertools.combinations(things, 2)]
    if any(apart < LEAST_GAP and same for apart, same in gaps):
        return False
    if all(apart > 0 for apart, _ in gaps):
        return True
    return all(
        seen.sum() >= (1 - MOST_HIDDEN) * whole.sum() and ndimage.label(seen)[1] == 1
        for whole, seen in visible(things, side)
    )
