"""From the bytes of a picture to an array of fixed size.

A picture is decoded to 8-bit RGB, and the largest window with the aspect of the target is laid on
it, in the centre or at random. One resampling maps the window to the target; a window of the
target's own size is copied. The filter is Lanczos-3, whose support grows with the scale: sharp, and
antialiased. A map of labels follows with the same window, by nearest neighbour.

Nothing here trusts its input: the size is checked before a pixel is decoded, and whatever a decoder
makes of hostile bytes becomes `BadImage`.
"""

import io
import os
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Shaped, UInt8
from PIL import Image, ImageOps

MAX_PIXELS = 64_000_000
FORMATS = (
    "PNG",
    "JPEG",
    "WEBP",
    "BMP",
    "GIF",
    "TIFF",
    "PPM",
)  # JPEG covers MPO, as cameras write it
_ORIENTATION = 0x0112  # the EXIF tag
_ON_THE_SIDE = (5, 6, 7, 8)  # its values for which height and width change places
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N", "I")


class BadImage(ValueError):
    """This record cannot be shown: broken, too large, or of a kind that is not a picture."""


class Window(NamedTuple):
    """The part of a picture that is shown."""

    source: tuple[int, int]  # (width, height) of the picture that `box` refers to
    box: tuple[float, float, float, float]  # left, top, right, bottom
    flip: bool  # mirrored left to right, after the cut


def draws(rng: np.random.Generator) -> tuple[float, float, bool]:
    """What a window is drawn from: where it lies along both axes, in [0, 1), and whether it may be mirrored."""
    u, v, coin = rng.random(3)
    return u, v, bool(coin < 0.5)


def window(
    source: tuple[int, int],
    target: tuple[int, int],
    *,
    crop: str,
    flip: bool,
    rng: np.random.Generator,
) -> Window:
    """The largest window of aspect `target` (h, w) on a picture of size `source` (width, height).

    Args:
      crop: "center", or "random" for a uniform position along the longer side.
      flip: mirror every second picture at random.
      rng: three numbers are drawn, whatever is asked for.
    """
    (width, height), (h, w) = source, target
    scale = max(h / height, w / width)
    cut_w, cut_h = min(w / scale, width), min(h / scale, height)
    u, v, mirrored = draws(rng)
    if crop == "center":
        u = v = 0.5
    left, top = u * (width - cut_w), v * (height - cut_h)
    if scale == 1:  # whole pixels: nothing has to be resampled
        cut_w, cut_h = w, h
        left, top = int(u * (width - w + 1)), int(v * (height - h + 1))  # u, v < 1
    right, bottom = min(left + cut_w, width), min(top + cut_h, height)  # rounding may exceed it
    return Window(source, (left, top, right, bottom), flip and mirrored)


def decode(
    data: Any, *, at_least: tuple[int, int] | None = None, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """An encoded picture (bytes) or a uint8 array `[h w]`, `[h w 1|3|4]` as an RGB Pillow image.

    Transparent pixels become white, 16-bit greys lose their lower byte, EXIF rotation is applied,
    of an animation the first frame is taken. A JPEG that is much larger than `at_least` (h, w) is
    decoded at 1/2, 1/4 or 1/8 of its size, but to no less than twice `at_least`: five times
    faster for a photograph of 12 megapixels.

    Raises:
      BadImage: the data cannot be decoded, or have more than `max_pixels` pixels.
    """
    return decode_sized(data, at_least=at_least, max_pixels=max_pixels)[0]


def decode_sized(
    data: Any, *, at_least: tuple[int, int] | None = None, max_pixels: int = MAX_PIXELS
) -> tuple[Image.Image, tuple[int, int]]:
    """`decode`, and the size (h, w) that the picture had, whatever fraction of it was decoded.

    Raises:
      BadImage: see `decode`.
    """
    try:
        image = _open(data, max_pixels)
        width, height = image.size
        if at_least is not None and image.format in ("JPEG", "MPO"):
            image.draft(None, (2 * max(at_least),) * 2)
        image.load()
        orientation = image.getexif().get(_ORIENTATION, 1)
        if orientation != 1:
            image = ImageOps.exif_transpose(image)
        if orientation in _ON_THE_SIDE:
            width, height = height, width
        return _rgb(image), (height, width)
    except BadImage:
        raise
    except Exception as error:  # decoders of hostile bytes raise anything, even KeyError
        raise BadImage(f"cannot be decoded: {type(error).__name__}: {error}") from error


def size_of(path: str | os.PathLike) -> tuple[int, int]:
    """(h, w) of the picture in a file as `decode` shows it, by its header alone; (0, 0) if there is none to read."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            # Pillow decodes a PNG to look for what it would have told already, and turns a TIFF itself.
            told = "exif" in image.info
            turned = told and image.getexif().get(_ORIENTATION, 1) in _ON_THE_SIDE
    except Exception:  # as in decode_sized
        return 0, 0
    return (width, height) if turned else (height, width)


def decode_labels(data: Any, *, max_pixels: int = MAX_PIXELS) -> Int[np.ndarray, "h w"]:
    """An encoded map of class numbers (grey or palette PNG), or an integer array `[h w (1)]`.

    Raises:
      BadImage: it has colours, or cannot be decoded.
    """
    if isinstance(data, np.ndarray):
        labels = data
    else:
        try:
            image = _open(data, max_pixels)
            labels = np.asarray(image)  # of a palette picture: the indices, which are the classes
        except BadImage:
            raise
        except Exception as error:  # as in decode
            raise BadImage(f"cannot be decoded: {type(error).__name__}: {error}") from error
    if labels.ndim == 3 and labels.shape[2] == 1:
        labels = labels[..., 0]
    if labels.ndim != 2 or labels.dtype.kind not in "uib":
        raise BadImage(f"a map of labels is [h w] of integers, not {labels.shape} {labels.dtype}")
    return labels.astype(np.int32)


def show(image: Image.Image, view: Window, target: tuple[int, int]) -> UInt8[np.ndarray, "h w 3"]:
    """The window of a picture, resampled to `target` (h, w) by Lanczos-3."""
    h, w = target
    if view.box == (0, 0, w, h) and image.size == (w, h):
        pixels = np.asarray(image)
    elif view.box[2] - view.box[0] == w and view.box[3] - view.box[1] == h:
        pixels = np.asarray(image.crop(tuple(int(edge) for edge in view.box)))
    else:  # pixels beyond the box join in at its edges, as in "resize, then cut"
        pixels = np.asarray(image.resize((w, h), Image.Resampling.LANCZOS, box=view.box))
    return pixels[:, ::-1] if view.flip else pixels


def show_labels(
    labels: Shaped[np.ndarray, "H W"], view: Window, target: tuple[int, int]
) -> Shaped[np.ndarray, "h w"]:
    """The same window of a map of labels that belongs to the picture, by nearest neighbour.

    Raises:
      BadImage: the map has another aspect than the picture.
    """
    (height, width), (h, w) = labels.shape, target
    pictured_w, pictured_h = view.source
    # A JPEG that was decoded at a fraction of its size has rounded sides: allow one pixel.
    if abs(width * pictured_h - height * pictured_w) > max(width, height):
        raise BadImage(
            f"a map of {width}x{height} does not fit a picture {pictured_w}x{pictured_h}"
        )
    left, right = (x * width / pictured_w for x in view.box[0::2])
    top, bottom = (y * height / pictured_h for y in view.box[1::2])
    columns = (left + (np.arange(w) + 0.5) * (right - left) / w).astype(int).clip(0, width - 1)
    rows = (top + (np.arange(h) + 0.5) * (bottom - top) / h).astype(int).clip(0, height - 1)
    shown = labels[rows[:, None], columns]
    return shown[:, ::-1] if view.flip else shown


def sizes(
    original: tuple[int, int], view: Window, target: tuple[int, int]
) -> Float[np.ndarray, "6"]:
    """What SDXL is told of a picture (Podell et al. 2023, section 2.2), in pixels.

    Its height and width before anything was done to it, the top and left of the cut in the picture
    as it was resized (and mirrored, if it was), and height and width of the target.
    """
    (h, w), (left, top, right, bottom) = target, view.box
    if view.flip:
        left = view.source[0] - right
    top, left = round(top * h / (bottom - view.box[1])), round(left * w / (right - view.box[0]))
    return np.array([*original, top, left, h, w], np.float32)


def to_unit(pixels: UInt8[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """uint8 0..255 to float32 -1..1."""
    x = pixels.astype(np.float32)
    x /= 127.5
    x -= 1
    return x


def _open(data: Any, max_pixels: int) -> Image.Image:
    if isinstance(data, np.ndarray):
        if data.dtype != np.uint8 or data.ndim not in (2, 3):
            raise BadImage(f"a picture is [h w c] of uint8, not {data.shape} {data.dtype}")
        data = data[..., 0] if data.ndim == 3 and data.shape[2] == 1 else data
        image = Image.fromarray(data)
    elif isinstance(data, bytes):
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    else:
        raise BadImage(f"a picture is bytes or an array, not {type(data).__name__}")
    if image.width * image.height > max_pixels:  # the header is read, no pixel is decoded yet
        raise BadImage(
            f"{image.width}x{image.height} pixels are more than {max_pixels / 1e6:g} million"
        )
    return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode in _SIXTEEN_BITS:  # Pillow's own conversion would clip them at 255
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise BadImage(f"grey values from {values.min()} to {values.max()} are not 16-bit")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise BadImage("floating-point pictures have no defined range; store 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")
