"""Metrics of sets of pictures against closed forms, and against slow and plain computations."""

import itertools

import numpy as np
import pytest
from scipy import linalg, stats

from ldm_jax.metrics import (
    frechet,
    inception_score,
    kernel_distance,
    moments,
    neighbours,
    pyramid,
)


def cloud(n, d, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    return 100 + scale * rng.standard_normal((n, d)) @ rng.standard_normal((d, d))


@pytest.mark.parametrize("sizes", [(50,), (1, 49), (20, 0, 30), (7,) * 7 + (1,)])
def test_moments_do_not_depend_on_the_batches(sizes):
    x = cloud(50, 4)
    found = moments.empty(4)
    for part in np.split(x, np.cumsum(sizes)[:-1]):
        found = moments.update(found, part) if len(part) else moments.merge(found, moments.empty(4))
    assert found.count == 50
    np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.covariance(found), np.cov(x, rowvar=False), rtol=1e-9)


def test_moments_of_large_means_keep_their_digits():
    x = np.float32(1e4) + np.float32([[0], [1], [2]])
    parts = (moments.of(row[None]) for row in x)
    found = moments.empty(1)
    for part in parts:
        found = moments.merge(found, part)
    np.testing.assert_allclose(moments.covariance(found), [[1.0]], rtol=1e-9)
    with pytest.raises(ValueError, match="two vectors, not 1"):
        moments.covariance(moments.of(x[:1]))


def gaussian(mean, covariance):
    """Moments whose covariance is exactly this one."""
    return moments.Moments(2, np.asarray(mean, float), np.asarray(covariance, float))


def test_the_frechet_distance_of_commuting_gaussians():
    """Then it is |m1 - m2|^2 + sum (s1 - s2)^2."""
    turn = stats.ortho_group(3, seed=0).rvs()
    a = gaussian([0, 0, 1], turn @ np.diag([1.0, 4.0, 0.0]) @ turn.T)
    b = gaussian([0, 2, 1], turn @ np.diag([9.0, 1.0, 4.0]) @ turn.T)
    expected = 4 + (1 - 3) ** 2 + (2 - 1) ** 2 + (0 - 2) ** 2
    assert frechet.distance(a, b) == pytest.approx(expected, rel=1e-7)
    assert frechet.distance(a, a) == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("n", [8, 100])  # fewer than there are features, and more
def test_the_frechet_distance_equals_the_matrix_root(n):
    x, y = cloud(n, 12, 1), cloud(n + 3, 12, 2)
    c1, c2 = (np.cov(part, rowvar=False) for part in (x, y))
    root = linalg.sqrtm((c1 @ c2).astype(complex)).real
    expected = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(c1 + c2 - 2 * root)
    found = frechet.distance(moments.of(x), moments.of(y))
    assert found == pytest.approx(expected, rel=1e-5)
    assert found == pytest.approx(frechet.distance(moments.of(y), moments.of(x)), rel=1e-6)
    with pytest.raises(ValueError, match="12 and 3 numbers"):
        frechet.distance(moments.of(x), moments.of(x[:, :3]))


def test_the_kernel_distance_is_the_mean_over_pairs():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 5, 3))

    def k(a, b):
        return (a @ b / 3 + 1) ** 3

    within = [np.mean([k(a, b) for a, b in itertools.permutations(of, 2)]) for of in (x, y)]
    across = np.mean([k(a, b) for a in x for b in y])
    expected = sum(within) - 2 * across
    assert kernel_distance.mmd(x, y) == pytest.approx(expected, rel=1e-12)
    whole = kernel_distance.distance(x, y, subset=5, subsets=3)
    assert whole.mean == pytest.approx(expected, rel=1e-12)
    assert whole.std == pytest.approx(0, abs=1e-12)


def test_the_kernel_distance_has_no_bias():
    """Of two samples of one distribution it is zero on average, with either sign."""
    rng = np.random.default_rng(0)
    values = [kernel_distance.mmd(*rng.standard_normal((2, 20, 4))) for _ in range(400)]
    assert abs(np.mean(values)) < 3 * np.std(values) / 20
    assert min(values) < 0 < max(values)
    with pytest.raises(ValueError, match="subsets of 30 pictures of 20 and 25"):
        kernel_distance.distance(np.zeros((20, 2)), np.zeros((25, 2)), subset=30)


def test_the_inception_score_in_closed_form():
    sure = 1e4 * np.tile(np.eye(6), (20, 1))  # every class as often
    assert inception_score.score(sure, splits=1).mean == pytest.approx(6, rel=1e-9)
    assert inception_score.score(np.ones((30, 6))).mean == pytest.approx(1, abs=1e-12)
    p, q = np.array([0.9, 0.1]), np.array([0.2, 0.8])
    logits = np.log(np.stack([p, q] * 10))
    middle = (p + q) / 2
    expected = np.exp(np.mean([np.sum(r * np.log(r / middle)) for r in (p, q)]))
    found = inception_score.score(logits, splits=1)
    assert found == pytest.approx((expected, 0), rel=1e-9)
    with pytest.raises(ValueError, match="5 pictures into 10 parts"):
        inception_score.score(logits[:5])


def plain_neighbours(real, generated):
    def away(a, b):
        return np.linalg.norm(a - b)

    def radius(x, i, k):
        return sorted(away(x[i], other) for j, other in enumerate(x) if j != i)[k - 1]

    n, m = len(real), len(generated)
    near, wide = ([radius(real, i, k) for i in range(n)] for k in (3, 5))
    own = [radius(generated, j, 3) for j in range(m)]
    d = [[away(g, r) for r in real] for g in generated]
    return (
        np.mean([any(d[j][i] <= near[i] for i in range(n)) for j in range(m)]),
        np.mean([any(d[j][i] <= own[j] for j in range(m)) for i in range(n)]),
        sum(d[j][i] < wide[i] for i in range(n) for j in range(m)) / (5 * m),
        np.mean([any(d[j][i] < wide[i] for j in range(m)) for i in range(n)]),
    )


def test_neighbours_equal_the_plain_computation(monkeypatch):
    monkeypatch.setattr(neighbours, "ROWS", 7)  # several blocks
    rng = np.random.default_rng(0)
    real, generated = rng.standard_normal((30, 3)), 1.5 + 0.8 * rng.standard_normal((25, 3))
    found, expected = neighbours.measure(real, generated), plain_neighbours(real, generated)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert 0.1 < min(found[:2]) < max(found[:2]) < 1


def test_neighbours_of_the_same_and_of_far_sets():
    x = np.random.default_rng(0).standard_normal((40, 5))
    same = neighbours.measure(x, x)
    assert same[:2] == (1, 1)
    assert same.coverage == 1
    assert same.density == pytest.approx(1)  # itself and four neighbours
    assert neighbours.measure(x, x + 100) == (0, 0, 0, 0)
    narrow = neighbours.measure(x, np.tile(x[:1], (40, 1)))
    assert narrow.precision == 1
    assert narrow.recall < 0.2
    with pytest.raises(ValueError, match="6 pictures on either side; there are 5 real and 40"):
        neighbours.measure(x[:5], x)


def pictures(n=6, side=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


def test_a_pyramid_adds_up_to_its_picture():
    levels = pyramid.pyramid(pictures(2, 64))
    assert [level.shape[1] for level in levels] == [64, 32, 16]
    x = levels[-1]
    for level in levels[-2::-1]:
        x = pyramid.up(x) + level
    np.testing.assert_allclose(x, pictures(2, 64), atol=1e-3)


def test_smoothing_keeps_constants_and_takes_the_five_taps():
    ones = np.ones((1, 16, 16, 1), np.float32)
    np.testing.assert_allclose(pyramid.down(ones), 1, rtol=1e-6)
    np.testing.assert_allclose(pyramid.up(ones), 1, rtol=1e-6)
    spike = np.zeros((1, 16, 16, 1), np.float32)
    spike[0, 8, 8] = 256
    around = pyramid.down(spike)[0, 3:6, 3:6, 0]
    np.testing.assert_allclose(around, [[1, 6, 1], [6, 36, 6], [1, 6, 1]], rtol=1e-6)


def test_sliced_wasserstein_is_the_mean_of_1d_distances():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((50, 2)).astype(np.float32), rng.uniform(size=(50, 2))
    b = b.astype(np.float32)
    directions = np.random.default_rng(1).standard_normal((4000, 2))
    directions /= np.linalg.norm(directions, axis=1)[:, None]
    expected = np.mean([stats.wasserstein_distance(a @ d, b @ d) for d in directions])
    assert pyramid.sliced_wasserstein(a, b) == pytest.approx(expected, rel=0.03)
    assert pyramid.sliced_wasserstein(a, a[::-1]) == 0


def test_pyramids_tell_the_scale_at_which_pictures_differ():
    real = pictures(8, 32)
    assert pyramid.distances(real, real) == {32: 0, 16: 0}
    fine = real.copy()
    fine[:, ::2] = fine[:, 1::2]  # only rows in pairs: the finest structure is lost
    found = pyramid.distances(real, fine)
    assert found[32] > 50
    with pytest.raises(ValueError, match="sides that 4 divides"):
        pyramid.sides(70, 66)
    with pytest.raises(ValueError, match="cannot be compared"):
        pyramid.distances(real, real[:4])
