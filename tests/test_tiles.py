import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import codec, tiles
from ldm_jax.diffusion import paths, samplers, solvers, windows
from ldm_jax.models.autoencoder import KLAutoencoder
from ldm_jax.types import Cond, Control, Prediction
from tests.drawn import drawn
from tests.exact import COV, KEY, MEAN, NO_COND, gaussian

LAYOUTS = [(20, 8, 3), (21, 8, 4), (64, 16, 8), (9, 8, 1), (8, 8, 4), (5, 8, 4), (100, 7, 0)]


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize(("length", "size", "overlap"), LAYOUTS)
def test_tiles_cover_and_their_weights_sum_to_one(length, size, overlap, wrap):
    a = tiles.axis(length, size, overlap, wrap)
    gaps = np.diff(a.starts, append=[length] if wrap and len(a.starts) > 1 else [])
    assert (gaps <= size - overlap).all()
    for ratio, halo in ((1, 0), (1, overlap // 2), (3, 0)):
        total, seen = np.zeros(length * ratio), np.zeros(length * ratio, bool)
        np.add.at(total, a.positions(ratio), a.weights(ratio, halo))
        seen[a.positions(ratio)] = True
        assert seen.all()
        np.testing.assert_allclose(total, 1, atol=1e-6)
    w = a.weights(1, overlap // 2)
    if len(w) > 1 and overlap > 1:
        assert (w[1, : overlap // 2] == 0).all()  # the halo


def smooth(x, number):
    """The mean of each position and its neighbours along every axis, which sees 2 positions far."""
    for axis in range(1, x.ndim - 1):
        pad = [(2, 2) if i == axis else (0, 0) for i in range(x.ndim)]
        padded = jnp.pad(x, pad)
        n = x.shape[axis]
        x = sum(jax.lax.slice_in_dim(padded, i, i + n, axis=axis) for i in range(5)) / 5
    return x


def test_a_local_function_in_tiles_is_that_of_the_whole():
    shapes = ((2, 30, 3), (1, 9, 12, 10, 2))
    xs = [jax.random.normal(KEY, shape) for shape in shapes]

    def both(x):
        tiling = tiles.axes(x.shape[1:-1], 8, 5)
        return [tiles.tiled(smooth, x, tiling, halo) for halo in (2, 0)], smooth(x, 0)

    for (found, without_halo), whole in jax.jit(lambda xs: [both(x) for x in xs])(xs):
        np.testing.assert_allclose(found, whole, atol=1e-5)
        assert np.abs(without_halo - whole).max() > 1e-3


def test_resolutions_may_change_by_whole_numbers():
    x = jax.random.normal(KEY, (2, 20, 12, 3))
    up = tiles.tiled(lambda x, _: x.repeat(2, 1).repeat(4, 2), x, tiles.axes((20, 12), 8, 2))
    np.testing.assert_allclose(up, x.repeat(2, 1).repeat(4, 2), atol=1e-6)
    down = tiles.tiled(lambda x, _: x[:, ::2, ::2], x, tiles.axes((10, 6), 4, 2))
    np.testing.assert_allclose(down, x[:, ::2, ::2], atol=1e-6)


def test_an_autoencoder_in_tiles():
    """The same up to what its norms see of a tile, with the memory of a tile."""
    model = KLAutoencoder(
        width=8, mults=(1, 2), blocks=1, groups=4, embed=4, z_channels=4, middle_attention=False
    )
    x = jax.random.uniform(KEY, (1, 128, 128, 3), minval=-1)
    arrays = {"params": drawn(model, x[:, :8, :8], KEY)["params"], "scale": jnp.float32(0.5)}
    whole = codec.autoencoder(model)
    parts = codec.tiled(whole, 16, 8)

    encode, encode_tiles = (
        jax.jit(of.encode).lower(arrays, x, KEY).compile() for of in (whole, parts)
    )
    z = encode(arrays, x, KEY)
    assert parts.shape((128, 128, 3)) == z.shape[1:]
    decode, decode_tiles = (jax.jit(of.decode).lower(arrays, z).compile() for of in (whole, parts))
    for large, small in ((encode, encode_tiles), (decode, decode_tiles)):
        sizes = [p.memory_analysis().temp_size_in_bytes for p in (large, small)]
        assert sizes[1] < sizes[0] / 3
    # A sample of the posterior: the noise of tiles is their own.
    np.testing.assert_allclose(encode_tiles(arrays, x, KEY).mean(), z.mean(), atol=0.1)
    y, y_tiles = decode(arrays, z), decode_tiles(arrays, z)
    assert y_tiles.shape == y.shape
    assert 1e-4 < np.abs(y_tiles - y).mean() / np.abs(y).mean() < 0.3  # the norms see less


def test_windows():
    path = paths.rectified_flow()
    denoise, t = gaussian(path, MEAN, COV), jnp.full((2,), 0.4)
    x = jax.random.normal(KEY, (2, 20, 11, 2))

    # A denoiser that sees its window, and conditions that lie on the data.
    def mean(x_t, t, cond):
        x0 = x_t.mean((1, 2), keepdims=True) * jnp.ones_like(x_t) + cond.spatial
        x0 = x0 + cond.controls[0].hint[:, ::2, ::2]
        return Prediction(x0, (x_t - 0.6 * x0) / 0.4)

    @jax.jit
    def predictions(x, turned):
        def cond(x):
            return Cond(spatial=3 * x, controls=(Control(x.repeat(2, 1).repeat(2, 2)),))

        ring = windows.windows(mean, (8, 11), (3, 0), wrap=(True, False))
        return (
            (windows.windows(denoise, 20, 4)(x, t, NO_COND), denoise(x, t, NO_COND)),
            windows.windows(denoise, 8, 3, wrap=(True, False))(x, t, NO_COND),
            windows.windows(mean, 8, 4)(x, t, cond(x)),
            (ring(x, t, cond(x)), ring(turned, t, cond(turned))),
        )

    (one, plain), many, seen, (ring, turned) = predictions(x, jnp.roll(x, 5, 1))
    for name in ("x0", "eps"):
        np.testing.assert_array_equal(
            *(getattr(p, name) for p in (one, plain))
        )  # one window is the denoiser itself
        # One that sees positions alone.
        np.testing.assert_allclose(*(getattr(p, name) for p in (many, plain)), atol=1e-5)
    np.testing.assert_allclose(0.6 * seen.x0 + 0.4 * seen.eps, x, atol=1e-5)
    corner = x[:, :8, :8].mean((1, 2), keepdims=True) + 4 * x
    np.testing.assert_allclose(seen.x0[:, :4, :3], corner[:, :4, :3], atol=1e-5)
    assert np.abs(seen.x0 - corner)[:, 8:].max() > 0.01
    # A circle: data turned by a step between windows give turned predictions.
    np.testing.assert_allclose(turned.x0, jnp.roll(ring.x0, 5, 1), atol=1e-5)


def test_windows_are_walked_down_a_grid_like_any_denoiser():
    path = paths.rectified_flow()
    denoise, points = gaussian(path, MEAN, COV), samplers.grid(path, 4)
    x = jax.random.normal(KEY, (1, 12, 2))
    ends = [
        samplers.sample(f, solvers.euler(), points, x, KEY, NO_COND)[0]
        for f in (denoise, windows.windows(denoise, 6, 2))
    ]
    np.testing.assert_allclose(*ends, atol=1e-5)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: tiles.axis(20, 8, 8), "tiles of 8 cannot overlap by 8"),
        (lambda: tiles.axes((20, 20), (8,), 2), r"\(8,\) has 1 values for 2 axes"),
        (
            lambda: tiles.tiled(smooth, jnp.ones((1, 20, 1)), tiles.axes((20,), 8, 3), 2),
            "a halo of 2 at both sides is more than the overlap of 3",
        ),
        (
            lambda: tiles.tiled(smooth, jnp.ones((1, 21, 1)), tiles.axes((20,), 8, 3)),
            r"\(21,\) positions does not lie on one of \(20,\)",
        ),
    ],
)
def test_wrong_tilings(act, message):
    with pytest.raises(ValueError, match=message):
        act()
