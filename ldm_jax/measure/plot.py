"""Bars with names and numbers, drawn by what is there for pictures."""

import os
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ldm_jax import media

WIDTH, NAME, NUMBER, LINE = (
    720,
    240,
    110,
    26,
)  # pixels: of all, of names, of numbers; height of a bar
COLOURS = ("#3f6fb5", "#c9703b", "#5a9a57")


def bars(path: str | os.PathLike, title: str, rows: Sequence[tuple[str, float]], unit: str) -> None:
    """One bar a row, the longest across; rows named alike up to the first comma have one colour."""
    font = ImageFont.load_default(14)
    picture = Image.new("RGB", (WIDTH, LINE * (len(rows) + 2)), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((8, 6), title, font=font, fill="black")
    longest = max(value for _, value in rows)
    kinds = list(dict.fromkeys(name.split(",")[0] for name, _ in rows))
    for i, (name, value) in enumerate(rows, 1):
        top = i * LINE + 8
        end = NAME + (WIDTH - NAME - NUMBER) * value / longest
        draw.text((8, top), name, font=font, fill="black")
        colour = COLOURS[kinds.index(name.split(",")[0]) % len(COLOURS)]
        draw.rectangle((NAME, top, max(end, NAME + 1), top + LINE - 8), fill=colour)
        draw.text((end + 6, top), f"{value:.3g} {unit}", font=font, fill="black")
    media.save_png(path, np.asarray(picture))
