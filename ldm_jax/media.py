"""Pictures as files: PNG with their provenance inside, and contact sheets to look at.

No name is ever made of a prompt. A file appears at once or not at all: it is written beside its
place and then renamed.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped, UInt8
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin


def to_uint8(x: Float[Any, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """[-1, 1] to 0..255, rounded; what lies outside is clipped.

    Raises:
      ValueError: a value is not a number.
    """
    x = np.asarray(x, np.float32)
    if np.isnan(x).any():
        raise ValueError(f"{int(np.isnan(x).sum())} of {x.size} values are NaN: this is no picture")
    return np.rint((x.clip(-1, 1) + 1) * 127.5).astype(np.uint8)


def save_png(
    path: str | os.PathLike,
    image: Shaped[np.ndarray, "h w *c"],
    text: Mapping[str, str] | None = None,
) -> None:
    """Write [h w], [h w 1] or [h w 3] as a PNG, and `text` (seed, prompt ...) into text chunks."""
    path = Path(path)
    chunks = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        chunks.add_itxt(key, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.{os.getpid()}")
    _picture(image).save(half, "PNG", pnginfo=chunks)
    os.replace(half, path)


def read_png(path: str | os.PathLike) -> UInt8[np.ndarray, "h w *c"]:
    """A PNG that `save_png` wrote: [h w] if it is grey, [h w 3] if it has colours."""
    with Image.open(path, formats=("PNG",)) as image:
        return np.asarray(image)


def read_png_text(path: str | os.PathLike) -> dict[str, str]:
    """The text chunks of a PNG."""
    with Image.open(path, formats=("PNG",)) as image:
        image.load()  # chunks may follow the pixels
        return {key: str(value) for key, value in image.text.items()}


def grid(
    images: Shaped[np.ndarray, "n h w c"],
    columns: int,
    captions: Sequence[str] | None = None,
    *,
    scale: int | None = None,
    gap: int = 8,
    font_size: int = 13,
) -> UInt8[np.ndarray, "H W 3"]:
    """A contact sheet of uint8 pictures, row by row on white, each with its caption below.

    Args:
      captions: one a picture, wrapped to its width and cut after five lines.
      scale: a whole factor by which pixels are repeated; pictures below 128 pixels grow to that
        without it.

    Raises:
      ValueError: no picture, another dtype, or another number of captions.
    """
    if images.dtype != np.uint8 or not len(images) or columns < 1:
        raise ValueError(
            f"a grid needs uint8 pictures and at least one column, not {images.shape} "
            f"{images.dtype} in {columns} columns; use to_uint8"
        )
    if captions is not None and len(captions) != len(images):
        raise ValueError(f"{len(captions)} captions for {len(images)} pictures; give one each")
    n, h, w, _ = images.shape
    columns = min(columns, n)
    if scale is None:
        scale = max(1, -(-128 // max(h, w)))
    font = ImageFont.load_default(font_size)
    texts = [_wrap(caption, font, w * scale) for caption in captions or []]
    rows = [range(first, min(first + columns, n)) for first in range(0, n, columns)]
    line = round(font_size * 1.3)
    heights = [
        h * scale + line * max((len(texts[i]) for i in row if texts), default=0) for row in rows
    ]

    width = columns * (w * scale + gap) + gap
    sheet = Image.new("RGB", (width, sum(heights) + gap * (len(rows) + 1)), "white")
    draw = ImageDraw.Draw(sheet)
    top = gap
    for row, height in zip(rows, heights, strict=True):
        for i in row:
            left = gap + (i % columns) * (w * scale + gap)
            tile = _picture(images[i]).convert("RGB")
            sheet.paste(tile.resize((w * scale, h * scale), Image.Resampling.NEAREST), (left, top))
            for number, words in enumerate(texts[i] if texts else []):
                below = top + h * scale + 2 + number * line
                draw.text((left, below), words, font=font, fill="black")
        top += height + gap
    return np.asarray(sheet)


def overlay(
    image: UInt8[np.ndarray, "h w c"], heat: Float[np.ndarray, "h w"]
) -> UInt8[np.ndarray, "h w 3"]:
    """A map in [0, 1] over a picture: from its dark grey through red and yellow to white."""
    grey = image.mean(-1, keepdims=True) * 0.5
    heat = heat.clip(0, 1)[..., None]
    glow = 255 * np.clip(3 * heat - np.arange(3), 0, 1)
    return np.rint((1 - heat) * grey + heat * glow).astype(np.uint8)


def _picture(image: np.ndarray) -> Image.Image:
    if (
        image.dtype != np.uint8
        or image.ndim not in (2, 3)
        or image.shape[2:] not in ((), (1,), (3,))
    ):
        raise ValueError(
            f"a picture is uint8 [h w], [h w 1] or [h w 3], not {image.shape} {image.dtype}; "
            "use to_uint8"
        )
    return Image.fromarray(
        np.ascontiguousarray(image[..., 0] if image.shape[2:] == (1,) else image)
    )


def _wrap(caption: str, font: Any, width: int, lines: int = 5) -> list[str]:
    """The caption in lines that are no wider than `width`; a word that is wider is broken."""
    wrapped = [""]
    for word in caption.split():
        joined = f"{wrapped[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            wrapped[-1] = joined
            continue
        wrapped += [""] if wrapped[-1] else []
        for letter in word:
            if wrapped[-1] and font.getlength(wrapped[-1] + letter) > width:
                wrapped.append("")
            wrapped[-1] += letter
    if len(wrapped) > lines:
        kept = wrapped[lines - 1]
        while kept and font.getlength(kept + "...") > width:
            kept = kept[:-1]
        wrapped = [*wrapped[: lines - 1], kept + "..."]
    return wrapped
