"""Large arrays in overlapping tiles: a function of a tile is asked at each place, and its answers are blended.

    y = sum_i w_i f(x[tile i]),    sum_i w_i = 1 at every position

Along each axis the weights fall to zero towards the neighbours: the outermost `halo` positions of a tile, which see its
artificial border, count nothing, and over the rest of the overlap two tiles are cross-faded. So a function whose
receptive field is at most the halo gives what it would give on the whole. The loop is one `lax.scan` with one tile in
memory; all tiles have one shape, so that the function is compiled once, whatever the size of the array.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

PerAxis = int | Sequence[int]


class Axis(NamedTuple):
    """Tiles along one axis."""

    starts: np.ndarray  # int32 [n]
    size: int
    overlap: int
    length: int  # of the axis
    wrap: bool  # the axis is a circle: a tile may go on at the beginning

    def positions(self, ratio: int = 1) -> np.ndarray:
        """Which positions each tile has, int32 [n, size ratio], where a position of x is `ratio` of them."""
        every = self.starts[:, None] * ratio + np.arange(self.size * ratio)
        return (every % (self.length * ratio)).astype(np.int32)

    def weights(self, ratio: int = 1, halo: int = 0) -> np.ndarray:
        """What each tile counts, float32 [n, size ratio]; they sum to one at every position."""
        n, size, overlap = len(self.starts), self.size * ratio, self.overlap * ratio
        inside = np.arange(size) + 0.5 - halo  # positions behind the halo
        ramp = np.clip(inside / max(overlap - 2 * halo, 1), 0, 1) if overlap else np.ones(size)
        w = np.empty((n, size))
        for i in range(n):
            first, last = (i == 0, i == n - 1) if not self.wrap or n == 1 else (False, False)
            w[i] = (1 if first else ramp) * (1 if last else ramp[::-1])
        total = np.zeros(self.length * ratio)
        np.add.at(total, self.positions(ratio), w)
        return (w / total[self.positions(ratio)]).astype(np.float32)


def axis(length: int, size: int, overlap: int, wrap: bool = False) -> Axis:
    """Tiles of `size` that overlap by at least `overlap` and cover the axis; a tile is no longer than the axis.

    Raises:
      ValueError: a size below one, or an overlap that leaves no step from tile to tile.
    """
    if size < 1 or not 0 <= overlap < size:
        raise ValueError(f"tiles of {size} cannot overlap by {overlap}; give 0 <= overlap < size")
    if length <= size:
        return Axis(np.zeros(1, np.int32), length, 0, length, wrap)
    room = length if wrap else length - overlap  # each tile adds its size less the overlap
    n = -(-room // (size - overlap))
    ends = length if wrap else length - size
    starts = np.floor(np.arange(n) * ends / (n if wrap else n - 1)).astype(np.int32)
    return Axis(starts, size, overlap, length, wrap)


def axes(
    space: Sequence[int], size: PerAxis, overlap: PerAxis, wrap: bool | Sequence[bool] = False
) -> tuple[Axis, ...]:
    """`axis` for each axis of a spatial shape; raises as it does, or for settings of another number of axes."""
    each = [
        (value,) * len(space) if isinstance(value, int) else tuple(value)
        for value in (size, overlap, wrap)
    ]
    for value in each:
        if len(value) != len(space):
            raise ValueError(
                f"{value} has {len(value)} values for {len(space)} axes; give one an axis"
            )
    return tuple(axis(*settings) for settings in zip(space, *each, strict=True))


def ratios(of: Sequence[int], to: Sequence[int]) -> tuple[int, ...]:
    """How many positions of `to` lie on one of `of`, along each axis.

    Raises:
      ValueError: no whole number of them.
    """
    if len(of) != len(to) or any(b % a for a, b in zip(of, to, strict=True)):
        raise ValueError(
            f"an array of {tuple(to)} positions does not lie on one of {tuple(of)}: its sizes must be multiples"
        )
    return tuple(b // a for a, b in zip(of, to, strict=True))


def take(
    x: Float[Array, "b *space c"],
    tiling: Sequence[Axis],
    starts: Sequence[Array],
    ratio: Sequence[int] = (),
) -> Float[Array, "b *tile c"]:
    """The tile of x that starts there, where x has `ratio` positions for one of the tiling."""
    ratio = tuple(ratio) or (1,) * len(tiling)
    for i, (a, start, r) in enumerate(zip(tiling, starts, ratio, strict=True), 1):
        positions = (start * r + jnp.arange(a.size * r)) % (a.length * r)
        x = jnp.take(x, positions, axis=i, mode="clip")
    return x


def blend(
    f: Callable[[tuple[Array, ...], Array], Any],
    tiling: Sequence[Axis],
    out: Any,
    halo: Sequence[int] = (),
    ratio: Sequence[int] = (),
) -> Any:
    """`f(starts of a tile, its number) -> one or more arrays [b *tile c]`, at all tiles, blended into `out`.

    Args:
      out: zeros of the whole result, a tree like that of f.
      halo: positions at each side of a result's tile that count nothing where it has a neighbour; by default none.
      ratio: positions of the result for one of the tiling; by default 1.

    Raises:
      ValueError: a halo that leaves nothing between two tiles.
    """
    ratio, halo = tuple(ratio) or (1,) * len(tiling), tuple(halo) or (0,) * len(tiling)
    for a, h, r in zip(tiling, halo, ratio, strict=True):
        if len(a.starts) > 1 and 2 * h > a.overlap * r:
            raise ValueError(
                f"a halo of {h} at both sides is more than the overlap of {a.overlap * r}; "
                "let the tiles overlap by more"
            )
    places = [a.positions(r) for a, r in zip(tiling, ratio, strict=True)]
    shares = [a.weights(r, h) for a, r, h in zip(tiling, ratio, halo, strict=True)]
    every = np.array(list(itertools.product(*(range(len(a.starts)) for a in tiling))))
    picked = [jnp.asarray(a.starts[every[:, i]]) for i, a in enumerate(tiling)]

    def body(total, tile):
        number, index, starts = tile
        where = [jnp.asarray(p)[index[i]] for i, p in enumerate(places)]
        weight = jnp.ones(())
        for i, share in enumerate(shares):
            weight = weight[..., None] * jnp.asarray(share)[index[i]]
        at = (slice(None), *jnp.ix_(*where))

        def add(whole, part):
            return whole.at[at].add(weight[..., None].astype(whole.dtype) * part)

        return jax.tree.map(add, total, f(starts, number)), None

    numbers = jnp.arange(len(every))
    return lax.scan(body, out, (numbers, jnp.asarray(every), tuple(picked)))[0]


def tiled(
    f: Callable[[Float[Array, "b *tile c"], Array], Float[Array, "b *out k"]],
    x: Float[Array, "b *space c"],
    tiling: Sequence[Axis],
    halo: int = 0,
) -> Float[Array, "b *whole k"]:
    """f(x, number of the tile), tile by tile; the tiling is of the coarser one of f's input and output.

    `halo` is in positions of the tiling. Where f changes the resolution, the change must be by whole numbers.

    Raises:
      ValueError: shapes that are no multiples of each other, or a halo that leaves nothing between two tiles.
    """
    lengths = tuple(a.length for a in tiling)
    fine = ratios(lengths, x.shape[1:-1])
    zero = tuple(jnp.zeros((), jnp.int32) for _ in tiling)
    piece = jax.eval_shape(lambda x: f(take(x, tiling, zero, fine), zero[0]), x)
    out = ratios(tuple(a.size for a in tiling), piece.shape[1:-1])
    whole = (piece.shape[0], *(n * r for n, r in zip(lengths, out, strict=True)), piece.shape[-1])

    def at(starts, number):
        return f(take(x, tiling, starts, fine), number)

    widths = tuple(halo * r for r in out)
    return blend(at, tiling, jnp.zeros(whole, piece.dtype), widths, out)
