"""The Laplacian-pyramid score: sliced Wasserstein distances between patches, scale by scale.

Pictures become Laplacian pyramids (Burt & Adelson 1983) whose coarsest level has at least 16 pixels a side. Of each
level of each picture 128 patches of 7 x 7 pixels are taken at random places; the patches of a set are brought to mean
0 and standard deviation 1 in each colour; and the two sets are compared by the mean, over 512 random directions, of
the 1-D Wasserstein distances of their projections (Karras et al. 2018, section 5). The unit is 1e-3. A level's number
says how well structure of that scale agrees; other sources call their mean a Laplacian score.
"""

import numpy as np
from jaxtyping import Float, UInt8
from scipy import ndimage

COARSEST = 16  # pixels
SIDE, PATCHES = 7, 128  # of a patch, and in a picture
DIRECTIONS, TOGETHER = 512, 128  # random directions, and how many at a time
TAPS = np.array([1, 4, 6, 4, 1]) / 16

Pictures = Float[np.ndarray, "n _h _w c"]


def sides(height: int, width: int) -> list[tuple[int, int]]:
    """The sizes of the levels, the finest first.

    Raises:
      ValueError: a picture that is too small, or that cannot be halved down to the coarsest level.
    """
    found = [(height, width)]
    while min(found[-1]) >= 2 * COARSEST:
        found.append((found[-1][0] // 2, found[-1][1] // 2))
    factor = 2 ** (len(found) - 1)
    if min(height, width) < COARSEST or height % factor or width % factor:
        raise ValueError(
            f"a pyramid of {height} x {width} pixels ends at {COARSEST} or more: it needs at least {COARSEST} pixels a "
            f"side, and sides that {factor} divides; give another --size"
        )
    return found


def _smooth(x: Pictures, gain: float = 1.0) -> Pictures:
    for axis in (1, 2):
        x = ndimage.convolve1d(x, np.float32(TAPS * gain), axis=axis, mode="mirror")
    return x


def down(x: Pictures) -> Pictures:
    """Half the size, smoothed."""
    return _smooth(x)[:, ::2, ::2]


def up(x: Pictures) -> Pictures:
    """Twice the size, smoothed."""
    wide = np.zeros((len(x), 2 * x.shape[1], 2 * x.shape[2], x.shape[3]), x.dtype)
    wide[:, ::2, ::2] = x
    return _smooth(wide, gain=2.0)


def pyramid(x: UInt8[np.ndarray, "n h w c"]) -> list[Pictures]:
    """The Laplacian pyramid in float32: what each level adds to the next coarser one, and the coarsest itself."""
    levels = [x.astype(np.float32)]
    for _ in sides(*x.shape[1:3])[1:]:
        smaller = down(levels[-1])
        levels[-1] = levels[-1] - up(smaller)
        levels.append(smaller)
    return levels


def patches(
    x: UInt8[np.ndarray, "n h w c"], rng: np.random.Generator
) -> list[Float[np.ndarray, "p 7 7 c"]]:
    """Random patches of every level of a batch."""
    found = []
    for level in pyramid(x):
        n, h, w, _ = level.shape
        windows = np.lib.stride_tricks.sliding_window_view(level, (SIDE, SIDE), axis=(1, 2))
        at = [rng.integers(0, size - SIDE + 1, (n, PATCHES)) for size in (h, w)]
        taken = windows[np.arange(n)[:, None], at[0], at[1]]  # n, patch, c, y, x
        found.append(np.moveaxis(taken, 2, -1).reshape(-1, SIDE, SIDE, level.shape[-1]))
    return found


def normalised(of: Float[np.ndarray, "p 7 7 c"]) -> Float[np.ndarray, "p q"]:
    """Patches as vectors, with mean 0 and standard deviation 1 in each colour."""
    mean, std = of.mean((0, 1, 2)), of.std((0, 1, 2))
    return ((of - mean) / np.maximum(std, 1e-8)).reshape(len(of), -1)


def sliced_wasserstein(a: Float[np.ndarray, "p q"], b: Float[np.ndarray, "p q"]) -> float:
    """The mean of the 1-D distances along random directions; 0 for equal sets, in whatever order."""
    rng = np.random.default_rng(0)
    values = []
    for _ in range(DIRECTIONS // TOGETHER):
        directions = rng.standard_normal((a.shape[1], TOGETHER)).astype(np.float32)
        directions /= np.linalg.norm(directions, axis=0)
        along = (np.sort(x @ directions, axis=0) for x in (a, b))
        values.append(np.abs(np.subtract(*along)).mean())
    return float(np.mean(values))


def distances(
    real: UInt8[np.ndarray, "n h w c"], generated: UInt8[np.ndarray, "m H W c"], batch: int = 64
) -> dict[int, float]:
    """The score of every level, times 1000, by its smaller side; both sets have as many pictures.

    Raises:
      ValueError: sets of different shapes, or pictures that have no pyramid.
    """
    if real.shape != generated.shape:
        raise ValueError(
            f"pyramids of pictures {real.shape} and {generated.shape} cannot be compared; "
            "give as many pictures of the same size"
        )
    sets = []
    for pictures in (real, generated):
        rng = np.random.default_rng(0)
        parts = [patches(pictures[i : i + batch], rng) for i in range(0, len(pictures), batch)]
        sets.append([normalised(np.concatenate(level)) for level in zip(*parts, strict=True)])
    names = [min(size) for size in sides(*real.shape[1:3])]
    return {name: 1e3 * sliced_wasserstein(a, b) for name, a, b in zip(names, *sets, strict=True)}
