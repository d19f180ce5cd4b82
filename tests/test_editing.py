"""Edits on denoisers that are exact: what is kept is kept to the bit, what is new has the right conditional law."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion import (
    diffedit,
    editing,
    inpainting,
    interpolation,
    inversion,
    samplers,
    solvers,
)
from ldm_jax.diffusion.process import Point
from ldm_jax.types import Cond, Prediction
from tests.exact import COV, KEY, MEAN, NO_COND, PATHS, gaussian

PATH = PATHS["scaled_linear"]
X0 = 0.4 * jax.random.normal(jax.random.key(5), (3, 4, 2)) + MEAN


def positions(path, mean, cov):
    """The denoiser of data [b n 1] whose n positions are correlated."""
    of_channels = gaussian(path, mean, cov)

    def denoise(x, t, cond):
        return Prediction(*(a.swapaxes(1, 2) for a in of_channels(x.swapaxes(1, 2), t, cond)))

    return denoise


def test_strength():
    assert editing.taken(50, 0.8) == 40
    assert editing.taken(10, (0.55, 1.0)).tolist() == [5, 10]
    for strength in (0.0, 1.2, 0.05, (0.5, 0.0), float("nan")):
        with pytest.raises(ValueError, match=r"must be in \(0, 1\], and strength \* steps"):
            editing.taken(10, strength)


def test_a_cut_grid_is_walked_from_where_it_begins():
    """Strengths are traced, one for all or one a sample, and give what the shorter grid gives."""
    denoise, points = gaussian(PATH, MEAN, COV), samplers.grid(PATH, 6)
    eps = jax.random.normal(KEY, X0.shape)

    @jax.jit
    def walk(steps):
        at = editing.cut(points, steps)
        start = editing.noised(at, X0, eps)
        return [
            samplers.sample(denoise, editing.resting(s), at, start, KEY, NO_COND)[0]
            for s in (solvers.heun(), solvers.dpmpp_2m())
        ]

    @jax.jit
    def short(start):
        at = Point(*(a[4:] for a in points))
        return [
            samplers.sample(denoise, s, at, start, KEY, NO_COND)[0]
            for s in (solvers.heun(), solvers.dpmpp_2m())
        ]

    expected = short(points.alpha[4] * X0 + points.sigma[4] * eps)
    together, alone, whole = (walk(jnp.asarray(n)) for n in ([2, 6, 2], 2, 6))
    assert walk._cache_size() == 2
    for found, one, all_of_it, want in zip(together, alone, whole, expected, strict=True):
        np.testing.assert_allclose(one, want, atol=1e-5)
        np.testing.assert_allclose(found[::2], want[::2], atol=1e-5)
        np.testing.assert_allclose(found[1], all_of_it[1], atol=1e-5)
        assert np.abs(all_of_it[1] - one[1]).max() > 0.05


def test_a_memory_shared_by_the_samples_cannot_begin_at_several_levels():
    counting = samplers.Solver(
        lambda x: jnp.zeros(()), lambda denoise, x, p, q, n, rng: (x, n + 1, x)
    )
    at = editing.cut(samplers.grid(PATH, 4), jnp.array([1, 2, 3]))
    with pytest.raises(ValueError, match="use one strength for all"):
        samplers.sample(lambda *_: None, editing.resting(counting), at, X0, KEY, NO_COND)


def test_inpainting_keeps_the_known_and_repainting_fits_the_new_to_it():
    """Of two correlated positions one is known; the other's law is that of the conditional Gaussian."""
    mean, cov, n = np.zeros(2, np.float32), np.float32([[1.0, 0.9], [0.9, 1.0]]), 4000
    denoise, points = positions(PATH, mean, cov), samplers.grid(PATH, 25, "trailing")
    known = jnp.full((n, 2, 1), 1.5)
    mask = jnp.broadcast_to(jnp.float32([0, 1])[:, None], known.shape)
    x_T = samplers.initial_noise(points, KEY, known.shape)

    @jax.jit
    def draw():
        solver = inpainting.blended(solvers.ddpm(), known, mask)
        again = inpainting.repaint(points, 5, 5)
        return (
            samplers.sample(denoise, solver, points, x_T, KEY, NO_COND)[0],
            samplers.sample(denoise, inpainting.jumping(solver), again, x_T, KEY, NO_COND)[0],
        )

    errors = []
    for x in draw():
        np.testing.assert_array_equal(x[:, 0], known[:, 0])
        errors.append([abs(x[:, 1].mean() - 1.35), abs(x[:, 1].std() - 0.19**0.5)])
    plain, repainted = errors
    assert plain[0] > 0.1  # so much does blending alone miss
    assert repainted[0] < plain[0] / 2
    assert repainted[1] < max(plain[1], 0.05)


def test_known_data_are_put_back_with_one_noise_or_with_new_ones():
    denoise, points = gaussian(PATH, MEAN, COV), samplers.grid(PATH, 5)
    eps, mask = jax.random.normal(KEY, X0.shape), jnp.zeros((3, 4, 1)).at[:, 2:].set(1)
    noises = jax.random.normal(jax.random.key(2), (5, *X0.shape))

    def way(eps):
        solver = inpainting.blended(solvers.ddim(1.0), X0, mask, eps)
        return samplers.sample(denoise, solver, points, x_T, noises, NO_COND, keep="x")[1][1:]

    x_T = eps
    fixed, fresh = way(eps), way(None)
    for i, (a, b) in enumerate(zip(fixed, fresh, strict=True)):
        p = Point(*(v[i + 1] for v in points))
        np.testing.assert_allclose(a[:, :2], (p.alpha * X0 + p.sigma * eps)[:, :2], atol=1e-6)
        np.testing.assert_allclose(b[:, :2], (p.alpha * X0 + p.sigma * noises[i])[:, :2], atol=1e-6)


def test_the_grid_of_repaint():
    """j = 2, r = 3 on six steps, by hand; and what goes up has the law of the noising chain."""
    found = inpainting.levels(6, 2, 3)
    assert found.tolist() == [0, 1, 2, 3, 1, 2, 3, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5, 6]
    assert inpainting.levels(6, 2, 1).tolist() == list(range(7))
    points = samplers.grid(PATH, 6)
    np.testing.assert_array_equal(inpainting.repaint(points, 2, 3).t, points.t[found])
    for jump, times in ((6, 2), (0, 2), (2, 0)):
        with pytest.raises(ValueError, match="give 1 <= jump < 6 and times >= 1"):
            inpainting.repaint(points, jump, times)
    n = 20_000
    p, q = (Point(*(a[i] for a in points)) for i in (4, 1))
    eps = jax.random.normal(KEY, (n, 1))
    x = p.alpha * 2.0 + p.sigma * eps
    up = inpainting.jumping(solvers.dpmpp_2m())
    again, memory, _ = _up(up, x, p, q)
    assert float(again.mean()) == pytest.approx(float(q.alpha * 2), abs=0.03)
    assert float(again.std()) == pytest.approx(float(q.sigma), rel=0.03)
    assert np.isinf(memory.at).all()  # begins anew
    assert not memory.taken.any()


def _up(solver, x, p, q):
    denoise = gaussian(PATH, np.zeros(1, np.float32), np.eye(1, dtype=np.float32))
    ask = lambda x, t: denoise(x, jnp.broadcast_to(t, x.shape[:1]), NO_COND)  # noqa: E731
    return solver.step(ask, x, p, q, solver.init(x), jax.random.key(1))


def test_masks_margins_and_composites():
    x = np.arange(2 * 4 * 6, dtype=np.float32).reshape(2, 4, 6, 1)
    large, mask = editing.padded(x, ((1, 2), (0, 3)))
    assert large.shape == mask.shape == (2, 7, 9, 1)
    np.testing.assert_array_equal(large[:, 1:5, :6], x)
    assert mask[:, 1:5, :6].max() == 0
    assert mask.sum() == 2 * (7 * 9 - 4 * 6)
    assert (large[:, :, 6:] == large[:, :, 5:6]).all()
    np.testing.assert_array_equal(editing.composite(large, -large - 1, mask)[:, 1:5, :6], x)
    some = np.zeros((1, 4, 6, 1), np.float32)
    some[0, 3, 1] = 1
    np.testing.assert_array_equal(editing.shrunk(some, 2)[0, ..., 0], [[0, 0, 0], [1, 0, 0]])
    assert editing.enlarged(jnp.ones((2, 4, 6, 3)), (8, 12)).shape == (2, 8, 12, 3)
    for margins in (((1, 1),), ((1, 1), (-1, 0))):
        with pytest.raises(ValueError, match="do not fit data of shape"):
            editing.padded(x, margins)


@pytest.mark.parametrize("name", ["scaled_linear", "rectified_flow", "edm"])
def test_inversion_and_back(name):
    """Once is of first order, the fixed point exact, Heun's of second; clean data are no special case."""
    path = PATHS[name]
    denoise = gaussian(path, MEAN, COV)
    ways = {"once": inversion.implicit(), "often": inversion.implicit(100)}
    if name == "rectified_flow":
        ways["heun"] = inversion.rising(solvers.heun())

    @jax.jit
    def errors(points):
        found = {}
        for key, up in ways.items():
            x_T, _ = inversion.invert(denoise, points, X0, NO_COND, up)
            down = solvers.heun() if key == "heun" else solvers.ddim()
            back, _ = samplers.sample(denoise, down, points, x_T, KEY, NO_COND)
            found[key] = jnp.abs(back - X0).max()
        return found

    spacing = "karras" if name == "edm" else "uniform"
    few, many = (jax.device_get(errors(samplers.grid(path, n, spacing))) for n in (20, 40))
    assert few["often"] < 1e-4 * max(1, 100 * (name == "edm")), few
    assert 0.3 < many["once"] / few["once"] < 0.75, (few, many)
    if "heun" in ways:
        assert many["heun"] < min(few["heun"] / 1.9, many["once"] / 3), (few, many)


def test_inversion_stops_where_the_grid_is_cut():
    denoise, points = gaussian(PATH, MEAN, COV), samplers.grid(PATH, 8)
    at = editing.cut(points, 3)
    short = Point(*(a[5:] for a in points))
    x, way = inversion.invert(denoise, at, X0, NO_COND, editing.resting(inversion.implicit()))
    expected, _ = inversion.invert(denoise, short, X0, NO_COND)
    np.testing.assert_allclose(x, expected, atol=1e-6)
    np.testing.assert_allclose(way[3], x, atol=1e-6)
    np.testing.assert_array_equal(way[-1], X0)
    with pytest.raises(ValueError, match="0 iterations cannot invert a step"):
        inversion.implicit(0)
    with pytest.raises(ValueError, match="cannot begin at clean data; use heun"):
        inversion.invert(denoise, points, X0, NO_COND, inversion.rising(solvers.dpmpp_2m()))


def test_edit_friendly_noises_make_the_data_again():
    denoise = gaussian(PATH, MEAN, COV)

    @jax.jit
    def there_and_back(points, keys):
        found = []
        for solver in (solvers.ddpm(), solvers.ddim(0.6)):
            made = inversion.edit_friendly(denoise, solver, points, X0, keys, NO_COND)
            back, _ = samplers.sample(denoise, solver, points, made.x_T, made.noises, NO_COND)
            found.append((made, back))
        return found

    for to_zero in (True, False):
        points = samplers.grid(PATH, 10, "leading", to_zero)
        for made, back in there_and_back(points, jax.random.split(KEY, 3)):
            np.testing.assert_allclose(back + made.rest, X0, atol=2e-6)
            assert made.noises.shape == (10, *X0.shape)
            # Levels are noised independently: the steps' noises are larger than drawn ones (their section 3.2).
            assert float(jnp.std(made.noises[:-1])) > 1.1
            # Every step has noise but the one to clean data.
            assert (np.abs(made.rest).max() < 1e-5) == (not to_zero)
    given = jax.random.normal(KEY, (11, *X0.shape))
    made = inversion.edit_friendly(denoise, solvers.ddpm(), points, X0, given, NO_COND)
    start = points.alpha[0] * X0 + points.sigma[0] * given[0]
    np.testing.assert_allclose(made.x_T, start, atol=1e-6)


def test_diffedit_finds_where_conditions_differ_and_changes_nothing_else():
    """The condition moves the mean of the right half alone."""
    right = jnp.zeros((1, 4, 1)).at[:, 2:].set(1)

    def denoise(x, t, cond):
        shift = right * cond.vector[:, None]
        plain = gaussian(PATH, MEAN, COV)
        alpha = PATH.alpha(t)[:, None, None]
        x0, eps = plain(x - alpha * shift, t, cond)
        return Prediction(x0 + shift, eps)

    cond, other = (Cond(vector=jnp.full((3, 1), value)) for value in (2.0, 0.0))
    points = samplers.grid(PATH, 20)

    @jax.jit
    def edit(key):
        level = Point(*(a[10] for a in points))
        found = diffedit.contrast(denoise, level, X0, key, cond, other, maps=3)
        mask = diffedit.binarised(found, limit=1.5)
        up = inversion.implicit(10)
        x, way = inversion.invert(denoise, points, X0, other, up)
        solver = diffedit.followed(solvers.ddim(), way, mask)
        return mask, way, samplers.sample(denoise, solver, points, x, key, cond, keep="x")

    mask, way, (x, states) = edit(KEY)
    np.testing.assert_array_equal(mask, jnp.broadcast_to(right, mask.shape))
    np.testing.assert_array_equal(x[:, :2], X0[:, :2])
    np.testing.assert_array_equal(states[:, :, :2], way[:-1, :, :2])
    # The noisy end, which is not quite pure noise, is kept.
    np.testing.assert_allclose(x[:, 2:], X0[:, 2:] + 2, atol=0.2)
    some = jnp.float32([[0.0, 0.0, 4.0, 4.0]])[..., None]
    np.testing.assert_array_equal(diffedit.binarised(some)[0, :, 0], [0, 0, 1, 1])


def test_interpolation():
    a, b = np.random.default_rng(0).standard_normal((2, 32, 32, 4)).astype(np.float32)
    shares = jnp.linspace(0, 1, 5)
    first, second = (
        Cond(tokens=x[:1, :3], mask=np.array([[True, m, False]]), vector=x[:1, 0])
        for x, m in ((a, True), (b, False))
    )
    e = np.array([[1.0, 0.0], [0.5, 0.75**0.5]], np.float32)

    @jax.jit
    def mixed(a, b, e, first, second):
        return (
            interpolation.frames(a, b, shares),
            interpolation.slerp(e[0], e[1], 1 / 3),
            interpolation.slerp(a, a, 0.3),
            [interpolation.between(first, second, shares, s) for s in (False, True)],
        )

    found, third, same, conds = jax.device_get(mixed(a, b, e, first, second))
    np.testing.assert_array_equal(found[0], a)
    np.testing.assert_array_equal(found[-1], b)
    np.testing.assert_allclose(found.std((1, 2, 3)), 1, atol=0.03)  # the line's would be 0.71
    np.testing.assert_allclose(third, [np.cos(np.pi / 9), np.sin(np.pi / 9)], atol=1e-6)  # of 60°
    np.testing.assert_allclose(same, a, atol=1e-5)
    for cond in conds:
        assert cond.tokens.shape == (5, 3, 4)
        for end, other in ((0, first), (-1, second)):
            np.testing.assert_allclose(cond.tokens[end], other.tokens[0], atol=1e-6)
            np.testing.assert_allclose(cond.vector[end], other.vector[0], atol=1e-6)
        np.testing.assert_array_equal(cond.mask, [[True, True, False]] * 5)
    np.testing.assert_allclose(conds[0].tokens[2], (a[0, :3] + b[0, :3]) / 2, atol=1e-6)
    with pytest.raises(ValueError, match="have not the same fields"):
        interpolation.between(first, Cond(), shares)
    with pytest.raises(ValueError, match="give one row each"):
        interpolation.between(Cond(vector=a[0]), Cond(vector=b[0]), shares)
