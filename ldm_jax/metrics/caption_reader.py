"""What a caption claims, by rules on words and not by the templates that write captions.

The text is cut into clauses at commas and conjunctions. In a clause stand objects (a colour, then a shape),
places (left, top, ...) and relations (left of, below it, ...). A place belongs to the object before it, or,
when the caption begins with a place, to the one after it. "Its" and "it" mean the object named before. All
other words, also those for sizes and backgrounds, are passed over.
"""

import re
from typing import NamedTuple

from ldm_jax.data.shapes.vocabulary import COLOURS, SHAPES


class Claim(NamedTuple):
    """An object in a caption."""

    colour: str
    shape: str
    place: tuple[str, ...] = ()  # of left, right, top, bottom, middle


class Claims(NamedTuple):
    """What a caption says: (i, "left", j) means that object i is left of object j."""

    objects: tuple[Claim, ...]
    relations: tuple[tuple[int, str, int], ...]


PLACES = {"left": "left", "right": "right", "top": "top", "upper": "top", "bottom": "bottom",
          "lower": "bottom", "middle": "middle", "centre": "middle", "center": "middle"}  # fmt: skip
RELATIONS = {"above": "above", "over": "above", "below": "below", "under": "below",
             "beneath": "below", "beside": "beside"}  # fmt: skip
BREAKS = re.compile(r"[,;:.]|\b(?:and|while|with|but)\b")
TOKENS = re.compile(
    rf"\b(?P<colour>{'|'.join(COLOURS)}) (?P<shape>{'|'.join(SHAPES)})\b"
    rf"|\b(?P<bare>{'|'.join(SHAPES)})(?P<plural>e?s)?\b"
    rf"|\b(?:to )?its (?P<its>left|right)\b"
    rf"|\b(?P<side>left|right) of(?P<side_it> it)?\b"
    rf"|\b(?P<relation>{'|'.join(RELATIONS)})(?P<relation_it> it)?\b"
    rf"|\b(?P<place>{'|'.join(PLACES)})\b"
)


def tokens(clause: str) -> list[tuple[str, ...]]:
    """The objects, places and relations of a clause, in order; "its" relates to the object before."""
    items = []
    for match in TOKENS.finditer(clause):
        part = match.groupdict()
        if part["bare"]:
            raise ValueError(
                f"cannot judge {match[0]!r} in {clause.strip()!r}: name every object by itself with a "
                f"colour of {list(COLOURS)} just before its shape, as in 'a small red circle'"
            )
        if part["shape"]:
            items.append(("object", part["colour"], part["shape"]))
        elif part["place"]:
            items.append(("place", PLACES[part["place"]]))
        else:
            word = part["its"] or part["side"] or RELATIONS[part["relation"]]
            its = part["its"] or part["side_it"] or part["relation_it"]
            items.append(("its" if its else "relation", word))
    return items


def parse(caption: str) -> Claims:
    """What a caption says of its objects: colour, shape, place and relations, by rules on words.

    Raises:
      ValueError: no object is named, an object has no colour, or a relation has no second object.
    """
    text = re.sub(r"\bof the (picture|image)\b", "", caption.lower())
    text = re.sub(r"\bnext to\b|\balongside\b", "beside", re.sub(r"[\s-]+", " ", text))
    objects: list[tuple[str, str]] = []
    places: list[tuple[int, str]] = []  # the number of an object, and where it is
    relations: list[tuple[int, str, int]] = []
    leads = False  # places come before their objects: "on the left a red circle, on the right ..."
    for clause in BREAKS.split(text):
        before, last = len(objects), None  # objects of earlier clauses; the last one of this clause
        items = tokens(clause)
        named = [t for t in items if t[0] == "object"]
        objects += [t[1:] for t in named]
        following = before  # the number of the next object to come
        for kind, *words in items:
            word = words[0]
            if kind == "object":
                last, following = following, following + 1
            elif kind == "place":
                leads = leads or following == 0
                onward = last is None and (named or leads)
                onward = onward or (leads and last is not None and following < len(objects))
                places.append((following if onward else following - 1, word))
            elif kind == "its":
                subject = following if last is None else last
                relations.append((subject, word, subject - 1))
            elif last is not None:  # "a red circle left of a blue square"
                relations.append((last, word, following))
            elif len(named) > 1 or before == 0:  # "left of a blue square there is a red circle"
                relations.append((following + 1, word, following))
            else:  # "a red circle, left of a blue square"
                relations.append((following - 1, word, following))
    if not objects:
        raise ValueError(
            f"no object in the caption {caption!r}; name a colour of {list(COLOURS)} and a shape "
            f"of {list(SHAPES)}, as in 'a red circle'"
        )
    for i, word, j in relations:
        if not (0 <= i < len(objects) and 0 <= j < len(objects)):
            raise ValueError(f"{word!r} in the caption {caption!r} relates nothing to an object")
    end = len(objects) - 1  # a place that no object follows is about the last one
    placed = [tuple(word for j, word in places if min(j, end) == i) for i in range(end + 1)]
    claims = [Claim(*o, place) for o, place in zip(objects, placed, strict=True)]
    return Claims(tuple(claims), tuple(relations))
