"""Saying what is in a scene, in varied English that is true of it.

A caption names every thing by colour and shape, mostly says where it is (in the picture or beside
another one), sometimes how large it is and what the background is like. Only what is beyond doubt
is said: a thing between "left" and "middle" has no place, and two things that lie diagonally have
no relation.

    caption  = [intro] clauses [background]
    clauses  = thing [place] | place thing | thing relation thing | relation thing, thing | ...
"""

from collections.abc import Sequence

import numpy as np

from ldm_jax.data.shapes.draw import Backdrop, Scene, Thing
from ldm_jax.data.shapes.scene import LEVELS, pick

SIZE_WORDS = {
    "small": ("small", "small", "little"),
    "medium": ("medium",),
    "large": ("large", "large", "big"),
}
PLACES = {
    "left": ("on the left", "on the left", "at the left", "on the left side"),
    "right": ("on the right", "on the right", "at the right", "on the right side"),
    "top": ("at the top", "at the top", "near the top", "in the upper half"),
    "bottom": ("at the bottom", "at the bottom", "near the bottom", "in the lower half"),
    "middle": ("in the middle", "in the middle", "in the centre", "in the center"),
    "top left": ("at the top left", "in the top left corner", "in the upper left"),
    "top right": ("at the top right", "in the top right corner", "in the upper right"),
    "bottom left": ("at the bottom left", "in the bottom left corner", "in the lower left"),
    "bottom right": ("at the bottom right", "in the bottom right corner", "in the lower right"),
}  # fmt: skip
RELATIONS = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "above", "over"),
    "below": ("below", "below", "under"),
}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
ITS = {"left": "to its left", "right": "to its right", "above": "above it", "below": "below it"}
INTROS = ("there is {}", "a picture of {}", "an image of {}", "a drawing of {}", "we see {}")
NUMBERS = {2: "two", 3: "three"}


def place_of(thing: Thing, side: int) -> str | None:
    """The place of a thing in the picture, by thirds with belts of doubt between them, or None."""

    def band(value, low, high):
        if value < 0.36:
            return low
        if value > 0.64:
            return high
        return "middle" if abs(value - 0.5) < 0.09 else None

    across, down = band(thing.x / side, "left", "right"), band(thing.y / side, "top", "bottom")
    if across == down == "middle":
        return "middle"
    edges = [word for word in (down, across) if word not in (None, "middle")]
    if len(edges) == 1 and None in (across, down):
        return None  # "left" is said of what is half-way down, not of what may be in a corner
    return " ".join(edges) or None


def relation_of(a: Thing, b: Thing, side: int) -> str | None:
    """Where `a` lies as seen from `b`, when one axis clearly decides."""
    dy, dx = (a.y - b.y) / side, (a.x - b.x) / side
    if abs(dx) > 0.15 and abs(dx) > 1.5 * abs(dy):
        return "left" if dx < 0 else "right"
    if abs(dy) > 0.15 and abs(dy) > 1.5 * abs(dx):
        return "above" if dy < 0 else "below"
    return None


def name(thing: Thing, rng: np.random.Generator) -> str:
    """ "a small red circle"; the size is said in four of ten."""
    words = [thing.colour, thing.shape]
    if rng.random() < 0.4:
        words.insert(0, pick(rng, SIZE_WORDS[thing.size]))
    return f"{'an' if words[0][0] in 'aeiou' else 'a'} {' '.join(words)}"


def brightness(level: float) -> str:
    return min(LEVELS, key=lambda word: abs(LEVELS[word] - level))


def behind(b: Backdrop, rng: np.random.Generator) -> str:
    """A last phrase about the background."""
    grey = {"dark": "dark grey", "middle": "grey", "light": "light grey"}[brightness(b.level)]
    shade = {"dark": "dark", "light": "light"}.get(brightness(b.level), "grey")
    look = pick(rng, (b.kind, b.kind, grey, shade, f"{b.kind} {grey}"))
    return pick(
        rng, (" on a {} background", " on a {} background", ", the background is {}")
    ).format(look)


def clause(thing: Thing, side: int, rng: np.random.Generator) -> str:
    """A thing, followed by its place if that is clear."""
    place = place_of(thing, side)
    return name(thing, rng) + (f" {pick(rng, PLACES[place])}" if place else "")


def one(thing: Thing, side: int, rng: np.random.Generator) -> tuple[str, bool]:
    """The clauses of a scene with one thing, and whether an intro may come before them."""
    place = place_of(thing, side)
    if place is None or rng.random() < 0.1:
        return name(thing, rng), True
    if rng.random() < 0.75:
        return f"{name(thing, rng)} {pick(rng, PLACES[place])}", True
    link = pick(rng, (", ", " there is ", " we see "))
    return f"{pick(rng, PLACES[place])}{link}{name(thing, rng)}", False


def two(a: Thing, b: Thing, side: int, rng: np.random.Generator) -> tuple[str, bool]:
    """The clauses of a scene with two things, `a` first, and whether an intro may come before."""
    relation = relation_of(a, b, side)
    places = [place_of(thing, side) for thing in (a, b)]
    first, second = name(a, rng), name(b, rng)
    form = rng.random()
    if relation and form < 0.35:
        return f"{first} {pick(rng, RELATIONS[relation])} {second}", True
    if relation and form < 0.45:
        return f"{first} with {second} {ITS[OPPOSITE[relation]]}", True
    if relation and form < 0.52:
        link = pick(rng, (", ", " there is "))
        return f"{pick(rng, RELATIONS[OPPOSITE[relation]])} {first}{link}{second}", False
    if relation in ("left", "right") and form < 0.58:
        return f"{first} {pick(rng, ('next to', 'beside'))} {second}", True
    if all(places) and form < 0.66:
        p, q = (pick(rng, PLACES[place]) for place in places)
        return f"{p} {first}, {q} {second}", False
    if any(places) and form < 0.95:
        text = f"{clause(a, side, rng)} and {clause(b, side, rng)}"
        return (f"two shapes: {text}", True) if rng.random() < 0.2 else (text, True)
    return f"{first} and {second}", True


def several(things: Sequence[Thing], side: int, rng: np.random.Generator) -> tuple[str, bool]:
    """The clauses of a scene with three things or more, and whether an intro may come before."""
    a, b, *rest = things
    relation = relation_of(a, b, side)
    if relation and rng.random() < 0.4:
        text = f"{name(a, rng)} {pick(rng, RELATIONS[relation])} {name(b, rng)}"
        return f"{text}, and {', and '.join(clause(thing, side, rng) for thing in rest)}", True
    clauses = [clause(thing, side, rng) for thing in things]
    text = f"{', '.join(clauses[:-1])} and {clauses[-1]}"
    if rng.random() < 0.25:
        text = f"{NUMBERS[len(things)]} shapes: {text}"
    return text, True


def describe(scene: Scene, rng: np.random.Generator) -> tuple[str, int]:
    """A caption, and the index of the thing that it names first."""
    order = list(range(len(scene.things)))
    rng.shuffle(order)
    things = [scene.things[i] for i in order]
    first = order[0]
    if len(things) == 1:
        text, intro = one(*things, scene.side, rng)
    elif len(things) == 2:
        text, intro = two(*things, scene.side, rng)
    else:
        text, intro = several(things, scene.side, rng)
    if intro and rng.random() < 0.4:
        plural = text.startswith(tuple(NUMBERS.values()))
        text = pick(rng, INTROS[1:] if plural else INTROS).format(text)
    if rng.random() < 0.2:
        text += behind(scene.backdrop, rng)
    return text, first
