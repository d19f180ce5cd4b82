import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion import guidance, paths, process, samplers, solvers, targets
from ldm_jax.diffusion.process import Point
from ldm_jax.types import Cond
from tests.exact import COV, KEY, MEAN, NO_COND, PATHS, SOLVERS, gaussian, run


@pytest.mark.parametrize("name", ["squared_cosine", "zero_snr", "cosine", "rectified_flow", "edm"])
def test_no_path_target_or_solver_makes_a_nan(name):
    """From pure noise to clean data with a network that knows nothing, 2 and 5 steps, all spacings."""
    path = PATHS[name]
    rows = [targets.x0(), targets.v(), targets.flow(), targets.edm()]
    if float(path.alpha(jnp.ones(()))) > 0:
        rows.append(targets.eps())
    spacings = [
        "uniform",
        "karras",
        "log_snr",
        *(["leading", "trailing", "linspace"] if path.steps else []),
    ]
    x_T = jax.random.normal(KEY, (2, 3, 1))

    few = [
        SOLVERS[s] for s in ("ddim_eta", "heun", "dpmpp_2m")
    ]  # with all targets; the others with v
    pairs = [(row, s) for row in rows for s in few] + [(targets.v(), s) for s in SOLVERS.values()]

    @jax.jit
    def ends(points):
        out = []
        for row, solver in pairs:
            denoise = process.make_denoiser(lambda x, t, c: x * t[0], path, row)
            out.append(samplers.sample(denoise, solver, points, x_T, KEY, NO_COND)[0])
        return jnp.stack(out)

    for spacing in spacings:
        points = samplers.grid(path, 5, spacing)
        assert points.sigma[-1] == 0
        assert np.isfinite(ends(points)).all(), spacing


def test_values_do_not_recompile_and_steps_do_not_unroll():
    path = paths.rectified_flow()
    traces = []

    def network(x, t, cond):
        traces.append(1)
        return x * cond.vector

    @jax.jit
    def draw(points, eta, scale, key, cond, null):
        denoise = process.make_denoiser(network, path, targets.flow())
        x_T = samplers.initial_noise(points, key, (2, 3))
        guided = guidance.cfg(denoise, null, scale)
        return samplers.sample(guided, solvers.ddim(eta), points, x_T, key, cond)

    cond, null = Cond(vector=jnp.ones((2, 3))), Cond(vector=jnp.zeros((2, 3)))
    draw(samplers.grid(path, 8), 0.0, 1.0, KEY, cond, null)
    once = len(traces)
    draw(samplers.grid(path, 8, "karras"), 0.5, 3.0, jax.random.key(9), cond, null)
    assert draw._cache_size() == 1
    assert len(traces) == once
    draw(samplers.grid(path, 200), 0.5, 3.0, KEY, cond, null)
    assert len(traces) == 2 * once  # a longer grid is another program, of the same size


def test_values_per_sample_give_what_each_sample_gives_alone():
    """Grids, eta, guidance scales and seeds, one a sample, for every solver's code path."""
    path = PATHS["scaled_linear"]
    denoise = gaussian(path, MEAN, COV)
    grids = [samplers.grid(path, 6, spacing) for spacing in ("uniform", "karras", "trailing")]
    keys, eta = jax.random.split(KEY, 3), jnp.array([0.0, 0.5, 1.0])
    together = Point(*(jnp.stack(a, 1) for a in zip(*grids, strict=True)))
    x_T = samplers.initial_noise(together, keys, (3, 5, 2))
    x_alone = [samplers.initial_noise(g, keys[i : i + 1], (1, 5, 2)) for i, g in enumerate(grids)]
    np.testing.assert_allclose(jnp.concatenate(x_alone), x_T, atol=1e-6)

    @jax.jit
    def walk(eta, points, x, key):
        named = [solvers.ddim(eta), solvers.ddpm("large"), solvers.heun(), solvers.dpmpp_2m()]
        return [samplers.sample(denoise, s, points, x, key, NO_COND)[0] for s in named]

    got = walk(eta, together, x_T, keys)
    for i in range(3):
        alone = walk(eta[i], grids[i], x_alone[i], keys[i : i + 1])
        for a, b in zip(got, alone, strict=True):
            np.testing.assert_allclose(a[i : i + 1], b, atol=2e-5)


def test_the_trajectory_is_kept_only_when_asked():
    path = paths.rectified_flow()
    denoise, points = gaussian(path, MEAN, COV), samplers.grid(path, 4)
    x_T = jax.random.normal(KEY, (3, 5, 2))
    x, nothing = run(denoise, solvers.heun(), points, x_T)
    same, film = run(denoise, solvers.heun(), points, x_T, keep="x0")
    assert nothing is None
    assert film.shape == (4, 3, 5, 2)
    np.testing.assert_array_equal(x, same)
    np.testing.assert_allclose(film[0], denoise(x_T, jnp.ones(3), NO_COND).x0, atol=1e-6)
    np.testing.assert_allclose(film[-1], x, atol=1e-6)  # the last step goes to its estimate of x0


def test_spacings_of_the_table_are_those_of_lin_et_al():
    """Their Table 2, for 1000 times and 5 or 10 samples."""
    path = PATHS["linear"]

    def times(n, spacing, **kwargs):
        return (
            np.round(np.asarray(samplers.grid(path, n, spacing, **kwargs).t) * 999)
            .astype(int)
            .tolist()
        )

    assert times(5, "leading") == [801, 601, 401, 201, 1, 0]
    assert times(5, "trailing") == [999, 799, 599, 399, 199, 0]
    assert times(5, "linspace") == [999, 749, 500, 250, 0, 0]
    assert times(10, "leading", to_zero=False)[-2:] == [1, 0]
    assert times(5, "leading", offset=0) == [800, 600, 400, 200, 0, 0]
    assert times(5, "leading", offset=0, to_zero=False) == [800, 600, 400, 200, 0, 0]
    assert times(1000, "leading")[:2] == [999, 998]  # no room to start late


@pytest.mark.parametrize("name", ["scaled_linear", "zero_snr", "rectified_flow", "edm"])
def test_grids_start_at_the_noisy_end_and_fall(name):
    path = PATHS[name]
    for spacing in ("uniform", "karras", "log_snr"):
        for to_zero in (True, False):
            points = samplers.grid(path, 9, spacing, to_zero)
            assert len(points.t) == 10
            assert points.t[0] == path.t_max
            ratio = np.asarray(points.alpha / points.sigma)
            assert (np.diff(ratio) > 0).all(), (spacing, to_zero)
            end = 0.0 if to_zero else float(path.sigma(jnp.zeros(())))
            assert float(points.sigma[-1]) == pytest.approx(end, rel=1e-3)


def test_initial_noise_is_as_wide_as_unit_data_there():
    for name, want in {"edm": 6401**0.5, "scaled_linear": 1.0, "rectified_flow": 1.0}.items():
        x = samplers.initial_noise(samplers.grid(PATHS[name], 4), KEY, (4000, 4))
        assert float(x.std()) == pytest.approx(want, rel=0.02)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: samplers.grid(PATHS["edm"], 4, "cosin"), "no spacing 'cosin'; the choices are"),
        (lambda: samplers.grid(PATHS["edm"], 4, "leading"), "this path has none; use 'uniform'"),
        (
            lambda: samplers.grid(PATHS["linear"], 2000, "trailing"),
            "2000 steps were asked of a table of 1000",
        ),
        (lambda: samplers.grid(PATHS["linear"], 0), "at least one step, not 0"),
    ],
)
def test_a_bad_grid_raises_one_clear_sentence(act, message):
    with pytest.raises(ValueError, match=message):
        act()


def test_noise_can_be_given_for_every_step():
    path, solver = PATHS["scaled_linear"], SOLVERS["ddpm"]
    points, x = samplers.grid(path, 5), jax.random.normal(KEY, (3, 4, 2))
    denoise = gaussian(path, MEAN, COV)
    keys = [jax.random.fold_in(KEY, i) for i in range(5)]
    drawn = jnp.stack([samplers.noise(key, x.shape) for key in keys])
    expected, _ = samplers.sample(denoise, solver, points, x, KEY, NO_COND)
    given, _ = samplers.sample(denoise, solver, points, x, drawn, NO_COND)
    np.testing.assert_allclose(given, expected, atol=1e-5)
    other, _ = samplers.sample(denoise, solver, points, x, -drawn, NO_COND)
    assert np.abs(other - expected).max() > 1e-2
    with pytest.raises(ValueError, match="noise for 4 steps was given, the grid has 5"):
        samplers.sample(denoise, solver, points, x, drawn[:4], NO_COND)
    with pytest.raises(ValueError, match=r"noise of shape \(2, 4, 2\) was given where \(3, 4, 2\)"):
        samplers.sample(denoise, solver, points, x, drawn[:, :2], NO_COND)
