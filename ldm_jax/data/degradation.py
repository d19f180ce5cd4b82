"""From a picture to a small one, for super-resolution: bicubic, or as badly as pictures in the wild are.

BSR (Zhang et al. 2021, "Designing a Practical Degradation Model for Deep Blind Image Super-Resolution") blurs twice,
shrinks in two steps, adds noise and compresses, in random order; after all a last JPEG. "bsr" and "bsr_light" are the
variants of CompVis/latent-diffusion (`bsrgan.py`, `bsrgan_light.py`, `degradation_bsrgan_variant`), of which LDM-BSR
was trained with the light one (Rombach et al. 2022, appendix D.6.1). Neither has a camera's pipeline, whose model was
never there.

Pictures are float32 [h w 3] in [0, 1]. What is drawn comes from one generator: the same one gives the same picture.
"""

import io
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image
from scipy import ndimage, signal

from ldm_jax.data import transforms

Picture = Float[np.ndarray, "h w 3"]
Other = Float[np.ndarray, "H W 3"]  # of another size
RESIZES = ("linear", "cubic", "area")  # as OpenCV has them: only the last one looks at all pixels
HALVED, COMPRESSED = (
    0.25,
    0.9,
)  # how likely a factor of 4 begins with one of 2, and a JPEG is among the steps
SHIFTED = 25  # the size of the kernel of a blur that shrinks
CUBIC = -0.75  # OpenCV's; -0.5 where the kernel is stretched, as MATLAB's and Pillow's


class Degree(NamedTuple):
    """How bad it gets."""

    blurs: int
    spread: float  # what kernels' widths are multiplied by
    sizes: tuple[
        tuple[int, int], tuple[int, int]
    ]  # of anisotropic and of round kernels: at least, at most
    odd: bool  # whether kernels have 2 n + 3 pixels a side, or n + 3
    resized: float  # how likely the first shrinking is a resize
    noise: tuple[int, int]  # its deviation in 255ths: at least, at most
    quality: tuple[int, int]  # of JPEG


DEGREES = {
    "bsr": Degree(2, 1.0, ((2, 11), (2, 11)), True, 0.75, (2, 25), (30, 95)),
    "bsr_light": Degree(1, 0.25, ((2, 11), (2, 4)), False, 0.8, (1, 2), (80, 95)),
}


def small(
    kind: str, pixels: UInt8[np.ndarray, "H W 3"], factor: int, rng: np.random.Generator
) -> Float[np.ndarray, "h w 3"]:
    """A picture `factor` times as small, in [-1, 1]; both sides are multiples of the factor."""
    if kind == "bicubic":
        return transforms.to_unit(shrunk(pixels, factor))
    return transforms.to_unit(to_bytes(bsr(DEGREES[kind], pixels / np.float32(255), factor, rng)))


def check(kind: str) -> None:
    """Raises: ValueError: an unknown kind."""
    if kind not in KINDS:
        raise ValueError(f"there is no degradation {kind!r}; choose of {KINDS}")


KINDS = ("bicubic", *DEGREES)


def shrunk(pixels: UInt8[np.ndarray, "H W 3"], factor: int) -> UInt8[np.ndarray, "h w 3"]:
    """A picture `factor` times as small, by bicubic interpolation that is antialiased."""
    h, w = (n // factor for n in pixels.shape[:2])
    return np.asarray(Image.fromarray(pixels).resize((w, h), Image.Resampling.BICUBIC))


def bsr(of: Degree, x: Picture, factor: int, rng: np.random.Generator) -> Other:
    """The degraded picture, `factor` times as small."""
    if factor == 4 and rng.random() < HALVED:
        half = (x.shape[0] // 2, x.shape[1] // 2)
        x = resized(x, half, one_of(RESIZES, rng) if rng.random() < 0.5 else "smooth").clip(0, 1)
        factor = 2
    steps = [*["blur"] * of.blurs, "shrink", "fit", "noise", "jpeg"]
    rng.shuffle(steps)
    first, second = sorted((steps.index("shrink"), steps.index("fit")))
    steps[first], steps[second] = "shrink", "fit"
    target = x.shape[:2]
    for step in steps:
        if step == "blur":
            x = blurred(x, kernel(of, factor, rng))
        elif step == "shrink":
            target = tuple(n // factor for n in x.shape[:2])
            x = shrunken(of, x, factor, rng).clip(0, 1)
        elif step == "fit":
            x = resized(x, target, one_of(RESIZES, rng)).clip(0, 1)
        elif step == "noise":
            x = (x + noise(of, x.shape, rng)).clip(0, 1)
        elif rng.random() < COMPRESSED:
            x = compressed(x, whole(of.quality, rng))
    return compressed(x, whole(of.quality, rng))


def shrunken(of: Degree, x: Picture, factor: int, rng: np.random.Generator) -> Other:
    """By a factor from 1 to 2 `factor`, or by a blur of which every `factor`-th pixel is taken, in blocks' middles."""
    if rng.random() < of.resized:
        by = rng.uniform(1, 2 * factor)
        size = tuple(max(int(n / by), 1) for n in x.shape[:2])
        return resized(x, size, one_of(RESIZES, rng))
    deviation = rng.uniform(0.1, 0.6 * factor)
    of_middle = gaussian(SHIFTED, np.eye(2) * deviation**2, shift=-(factor - 1) / 2)
    return blurred(x, of_middle)[::factor, ::factor]


def kernel(of: Degree, factor: int, rng: np.random.Generator) -> Float[np.ndarray, "k k"]:
    """A Gaussian kernel: every second one longer in one direction than in the other."""
    turned = rng.random() < 0.5
    size = whole(of.sizes[0 if turned else 1], rng)
    size = 2 * size + 3 if of.odd else size + 3
    if not turned:
        deviation = of.spread * (2 + 0.2 * factor) * rng.random()
        return gaussian(size, np.eye(2) * deviation**2)
    lengths = of.spread * (4 + factor) * rng.random(2)  # variances along the two directions
    angle = np.pi * rng.random()
    turn = np.array([[np.cos(angle), np.sin(angle)], [np.sin(angle), -np.cos(angle)]])
    return gaussian(size, turn @ np.diag(lengths) @ turn)


def gaussian(
    size: int, covariance: Float[np.ndarray, "2 2"], shift: float = 0.0
) -> Float[np.ndarray, "{size} {size}"]:
    """A Gaussian about the middle, or `shift` pixels further along both axes, whose sum is 1."""
    at = np.arange(size) - (size - 1) / 2 - shift
    points = np.stack(np.meshgrid(at, at), -1)
    inverse = np.linalg.inv(covariance + 1e-4 * np.eye(2))  # of a point, too
    power = -0.5 * np.einsum("ijk,kl,ijl->ij", points, inverse, points)
    found = np.exp(power - power.max())
    return found / found.sum()


def blurred(x: Picture, kernel: Float[np.ndarray, "k k"]) -> Picture:
    """The convolution, of a picture that goes on mirrored: `scipy.ndimage.convolve(..., mode="mirror")`, faster."""
    size = len(kernel)
    if (
        min(x.shape[:2]) <= size // 2
    ):  # the mirror image of a picture that is too small for one reflection
        return ndimage.convolve(x, kernel[..., None], mode="mirror")
    before = size // 2 - (size % 2 == 0)
    pad = (before, size - 1 - before)
    framed = np.pad(x, (pad, pad, (0, 0)), mode="reflect")
    return signal.fftconvolve(framed, kernel[..., None], mode="valid", axes=(0, 1)).astype(x.dtype)


def noise(of: Degree, shape: tuple[int, ...], rng: np.random.Generator) -> Float[np.ndarray, "..."]:
    """Gaussian noise: of each channel (2 of 5), grey (2 of 5), or with channels that go together."""
    deviation, kind = whole(of.noise, rng) / 255, rng.random()
    if kind > 0.6:
        return rng.normal(0, deviation, shape).astype(np.float32)
    if kind < 0.4:
        return rng.normal(0, deviation, (*shape[:2], 1)).astype(np.float32)
    turn = np.linalg.qr(rng.random((3, 3)))[0]
    together = np.abs(turn.T @ np.diag(rng.random(3)) @ turn) * (of.noise[1] / 255) ** 2
    values, vectors = np.linalg.eigh(together)
    root = vectors * np.sqrt(values.clip(0))
    return (rng.normal(size=shape) @ root.T).astype(np.float32)


def compressed(x: Picture, quality: int) -> Picture:
    """What JPEG leaves of it."""
    file = io.BytesIO()
    Image.fromarray(to_bytes(x)).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file), np.float32) / 255


def resized(
    x: Picture, size: tuple[int, int], kind: Literal["linear", "cubic", "area", "smooth"]
) -> Other:
    """Another size (h, w), as `cv2.resize` has it; "smooth" is cubic with a kernel that stretches where it shrinks."""
    for axis, n in enumerate(size):
        weights = interpolation(x.shape[axis], n, kind)
        x = np.moveaxis(np.tensordot(weights, x, (1, axis)), 0, axis)
    return x


def interpolation(before: int, after: int, kind: str) -> Float[np.ndarray, "after before"]:
    """How much each old position counts for each new one; beyond the ends the last position goes on."""
    scale = before / after
    if kind == "area" and scale > 1:
        edges = np.arange(after + 1) * scale
        low, high = np.maximum.outer(edges[:-1], np.arange(before)), edges[1:, None]
        covered = np.minimum(high, np.arange(before) + 1) - low
        return (covered.clip(0) / scale).astype(np.float32)
    stretch = max(scale, 1.0) if kind == "smooth" else 1.0
    shape: Callable = linear if kind in ("linear", "area") else cubic
    reach = int(np.ceil(2 * stretch)) + 1
    centre = (np.arange(after) + 0.5) * scale - 0.5
    taps = np.floor(centre)[:, None] + np.arange(-reach, reach + 1)
    value = shape((taps - centre[:, None]) / stretch, -0.5 if kind == "smooth" else CUBIC)
    weights = np.zeros((after, before), np.float32)
    rows = np.repeat(np.arange(after), taps.shape[1])
    np.add.at(weights, (rows, taps.clip(0, before - 1).astype(int).ravel()), value.ravel())
    return weights / weights.sum(1, keepdims=True)


def linear(distance: np.ndarray, _: float) -> np.ndarray:
    return (1 - np.abs(distance)).clip(0)


def cubic(distance: np.ndarray, a: float) -> np.ndarray:
    """Keys 1981, eq. 15, with its free parameter."""
    d = np.abs(distance)
    near = ((a + 2) * d - (a + 3)) * d**2 + 1
    far = a * (((d - 5) * d + 8) * d - 4)
    return np.where(d < 1, near, np.where(d < 2, far, 0))


def to_bytes(x: Picture) -> UInt8[np.ndarray, "h w 3"]:
    return np.rint(x.clip(0, 1) * 255).astype(np.uint8)


def whole(limits: tuple[int, int], rng: np.random.Generator) -> int:
    return int(rng.integers(limits[0], limits[1] + 1))


def one_of(names: tuple[str, ...], rng: np.random.Generator) -> str:
    return names[int(rng.integers(len(names)))]
