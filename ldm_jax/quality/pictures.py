"""Sets of pictures by number: a folder, or what is in memory; in 8-bit RGB."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from tqdm import tqdm

from ldm_jax.data import folder as folders
from ldm_jax.data import transforms
from ldm_jax.data.records import Source
from ldm_jax.training import processes

Picture = UInt8[np.ndarray, "h w 3"]


class Unusable(ValueError):
    """Pictures that cannot be read, or that do not fit together."""


class Pictures(NamedTuple):
    """A set of pictures."""

    name: str  # for messages
    count: int
    read: Callable[[int], Picture]
    names: tuple[str, ...] | None = None  # of files, relative to their folder
    captions: tuple[str, ...] | None = None
    fingerprint: str = ""  # changes when the pictures do; empty: nobody knows

    def first(self, n: int) -> "Pictures":
        """Not more than the first n."""
        return self._replace(count=min(n, self.count))


def of_array(name: str, x: UInt8[np.ndarray, "n h w 3"], captions: Sequence[str] = ()) -> Pictures:
    return Pictures(name, len(x), lambda i: x[i], captions=tuple(captions) or None)


def of_folder(path: str | Path, size: int | None = None, convention: str | None = None) -> Pictures:
    """The pictures below a folder in the order of their names; with `size`, cut to squares and resampled to it.

    Captions are read where the folder has them, in one of the ways of `data.folder`, of which `convention` names one.

    Raises:
      FileNotFoundError: no such folder.
      ValueError: no picture in it.
      Unusable: when a picture is read that cannot be decoded: its name, and why.
    """
    of = folders.folder(path, convention=convention)
    captions = tuple(of.captions()) or None
    made = of_source(of, str(path), size)
    return made._replace(names=of.files, captions=captions)


def of_source(of: Source, name: str, size: int | None = None) -> Pictures:
    """The pictures of records, with `size` as in `of_folder`.

    Raises:
      Unusable: when a picture is read that cannot be decoded: its name, and why.
    """

    def read(i):
        try:
            image = transforms.decode(of[i]["image"])
        except (transforms.BadImage, OSError) as error:
            raise Unusable(
                f"the picture {of.name_of(i)} cannot be used ({error}); repair or remove it"
            ) from error
        return np.asarray(image if size is None else _square(image, size))

    return Pictures(name, len(of), read, fingerprint=f"{of.fingerprint} {size}")


def _square(image: Image.Image, size: int) -> Picture:
    target = (size, size)
    rng = np.random.default_rng(0)  # decides nothing in a centred window
    view = transforms.window(image.size, target, crop="center", flip=False, rng=rng)
    return transforms.show(image, view, target)


def bar_of(count: int, what: str) -> tqdm:
    """A progress bar, which of several processes the first one shows, and which leaves no line in a run that trains."""
    hidden = not processes.first()
    return tqdm(
        total=count, unit="picture", desc=what, mininterval=1.0, leave=False, disable=hidden
    )


def stacked(of: Pictures, start: int, end: int) -> UInt8[np.ndarray, "n h w 3"]:
    """Some of the pictures as one array.

    Raises:
      Unusable: they differ in size.
    """
    return together([of.read(i) for i in range(start, end)], of.name)


def together(pictures: Sequence[np.ndarray], name: str) -> np.ndarray:
    """Pictures of one size as an array.

    Raises:
      Unusable: they differ in size.
    """
    if len(sizes := {picture.shape[:2] for picture in pictures}) > 1:
        shown = " and ".join(f"{h} x {w}" for h, w in sorted(sizes)[:2])
        raise Unusable(f"the pictures of {name} differ in size ({shown}); --size brings all to one")
    return np.stack(pictures)


def check_pairs(first: Pictures, second: Pictures) -> None:
    """Looks whether two sets are pictures of the same things, by the names of their files.

    Raises:
      ValueError: other names.
    """
    stems = [{Path(n).with_suffix("").as_posix() for n in of.names or ()} for of in (first, second)]
    if stems[0] != stems[1] or first.count != second.count:
        odd = f", such as {min(stems[0] ^ stems[1])!r}" if stems[0] != stems[1] else ""
        raise ValueError(
            f"PSNR, SSIM and LPIPS compare picture with picture, and {first.name} and {second.name} have other "
            f"pictures{odd}; give each picture its original under the same name"
        )
