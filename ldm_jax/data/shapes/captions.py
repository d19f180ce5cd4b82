"""Saying what is in a scene, in varied English that is true of it.

A caption names every thing by colour and shape, mostly says where it is (in the picture or beside
another one), sometimes how large it is and what the background is like. Only what is beyond doubt
is said: a thing between "left" and "middle" has no place, and two things that lie diagonally have
no relation.

    caption  = [intro] clauses [background]
    clauses  = thing [place] | thing relation thing | thing [place] and thing [place] | ...
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
    "left": ("on the left", "at the left"),
    "right": ("on the right", "at the right"),
    "top": ("at the top", "near the top"),
    "bottom": ("at the bottom", "near the bottom"),
    "middle": ("in the middle", "in the centre"),
    "top left": ("at the top left", "in the upper left"),
    "top right": ("at the top right", "in the upper right"),
    "bottom left": ("at the bottom left", "in the lower left"),
    "bottom right": ("at the bottom right", "in the lower right"),
}
RELATIONS = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "above", "over"),
    "below": ("below", "below", "under"),
}
INTROS = ("there is {}", "a picture of {}", "an image of {}", "a drawing of {}", "we see {}")


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


def one(thing: Thing, side: int, rng: np.random.Generator) -> str:
    """A scene with one thing; its place is said in nine of ten."""
    return clause(thing, side, rng) if rng.random() < 0.9 else name(thing, rng)


def two(a: Thing, b: Thing, side: int, rng: np.random.Generator) -> str:
    """A scene with two things, `a` first: where each stands, how they stand to each other, or neither."""
    relation, form = relation_of(a, b, side), rng.random()
    if relation and form < 0.45:
        return f"{name(a, rng)} {pick(rng, RELATIONS[relation])} {name(b, rng)}"
    if form < 0.9:
        return f"{clause(a, side, rng)} and {clause(b, side, rng)}"
    return f"{name(a, rng)} and {name(b, rng)}"


def several(things: Sequence[Thing], side: int, rng: np.random.Generator) -> str:
    """A scene with three things or more."""
    a, b, *rest = things
    relation = relation_of(a, b, side)
    if relation and rng.random() < 0.4:
        text = f"{name(a, rng)} {pick(rng, RELATIONS[relation])} {name(b, rng)}"
        return f"{text}, and {', and '.join(clause(thing, side, rng) for thing in rest)}"
    clauses = [clause(thing, side, rng) for thing in things]
    return f"{', '.join(clauses[:-1])} and {clauses[-1]}"


def describe(scene: Scene, rng: np.random.Generator) -> tuple[str, int]:
    """A caption, and the index of the thing that it names first."""
    order = list(range(len(scene.things)))
    rng.shuffle(order)
    things = [scene.things[i] for i in order]
    if len(things) > 2:
        text = several(things, scene.side, rng)
    else:
        text = (one if len(things) == 1 else two)(*things, scene.side, rng)
    if rng.random() < 0.3:
        text = pick(rng, INTROS).format(text)
    if rng.random() < 0.15:
        text += behind(scene.backdrop, rng)
    return text, order[0]
