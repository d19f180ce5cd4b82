"""The deterministic solvers on data whose denoiser is exact: orders, short grids, grids for each sample."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion import samplers, solvers
from ldm_jax.diffusion.process import Point
from ldm_jax.diffusion.solvers import multistep
from tests.exact import COV, KEY, MEAN, NO_COND, PATHS, Mixture, gaussian
from tests.jaxprs import occurrences

MIXTURE = Mixture([0.35, 0.65], [-1.2, 0.6], [0.35, 0.5])
# name, options, order
ORDERS = [
    ("heun", dict(ratio=True), 2),
    ("dpm2", {}, 2),
    ("dpm_solver", dict(algorithm="dpmsolver"), 2),
    ("dpm_solver", dict(solver_type="heun"), 2),
    ("dpmpp_3m", {}, 3),
    ("dpm_solver", dict(order=3, algorithm="dpmsolver"), 3),
    ("dpm_solver", dict(order=3, halved=True), 2),
    ("dpm_solver_singlestep", {}, 2),
    ("dpm_solver_singlestep", dict(order=3, solver_type="heun"), 3),
    ("dpm_solver_singlestep", dict(order=3, algorithm="dpmsolver"), 3),
    ("unipc", dict(order=1), 2),
    ("unipc", dict(order=2, corrector=False), 2),
    ("unipc", {}, 3),
    ("unipc", dict(of="eps", variant="bh1"), 3),
    ("unipc", dict(order=3), 4),
    ("lms", dict(order=2), 2),
    ("lms", {}, 4),
    ("deis", {}, 3),
    ("ipndm", {}, 2),
    ("plms", {}, 2),
    ("pndm", {}, 2),
]
NAMES = [name for name in solvers.TABLE if not solvers.TABLE[name].stochastic]
NEW = sorted({name for name, *_ in ORDERS} | {"euler", "dpmpp_2m"})


def stacked(grids):
    """One grid a sample; the shorter ones stay at their last level."""
    longest = max(len(g[0]) for g in grids)
    padded = [[np.pad(a, (0, longest - len(a)), "edge") for a in g] for g in grids]
    return Point(*(jnp.asarray(np.stack(a, 1)) for a in zip(*padded, strict=True)))


def level_grid(path, steps):
    """Equal steps in lambda after a start in small ones, in which a memory fills without a trace.

    One more level, which is the last one again: there UniPC corrects its last step.
    """
    lam = np.linspace(-2.6, 3.5, steps + 1)
    small = lam[0] + (lam[1] - lam[0]) * 2.0 ** np.arange(-10, 0)
    t = path.time_of(jnp.asarray(np.concatenate([lam[:1], small, lam[1:], lam[-1:]])))
    return [np.asarray(a) for a in (t, path.alpha(t), path.sigma(t))]


@pytest.mark.parametrize(
    ("name", "cases"),
    [("rectified_flow", ORDERS), ("scaled_linear", ORDERS[::2]), ("edm", ORDERS[1::2])],
)
def test_errors_fall_at_their_orders(name, cases):
    """Against the exact flow, which keeps quantiles. The number of steps is another one for each sample."""
    path, counts = PATHS[name], (50, 98, 194)  # with the start divisible by 6: whole groups
    made = [solvers.make(solver, path, **options) for solver, options, _ in cases]
    u, denoise = np.linspace(0.05, 0.95, 5), MIXTURE.denoiser(path)

    @jax.jit
    def solve(points, x):
        return [samplers.sample(denoise, s, points, x, KEY, NO_COND)[0] for s in made]

    with jax.enable_x64(True):
        points = stacked([level_grid(path, n) for n in counts])
        alpha, sigma = np.asarray(points.alpha), np.asarray(points.sigma)
        start, end = (MIXTURE.quantiles(u, alpha[i, 0], sigma[i, 0]) for i in (0, -1))
        x_T = jnp.asarray(np.tile(start[:, None], (len(counts), 1, 1)))
        found = [np.asarray(x)[..., 0] - end for x in solve(points, x_T)]
    for (solver, options, order), difference in zip(cases, found, strict=True):
        error = np.sqrt(np.mean(difference**2, axis=1))
        slope = np.log2(error[1] / error[2]) / np.log2(counts[2] / counts[1])
        print(f"{solver} {options}: {error}, {slope:.2f}")
        assert slope == pytest.approx(order, abs=0.25), (solver, options, error)


@pytest.mark.parametrize("name", ["zero_snr", "rectified_flow", "edm"])
def test_one_two_and_three_steps_are_finite_and_each_sample_has_its_grid(name):
    """From the noisy end to clean data; one step is the first estimate of x0."""
    path = PATHS[name]
    denoise = gaussian(path, MEAN, COV)
    grids = [[np.asarray(a) for a in samplers.grid(path, n)] for n in (1, 2, 3)]
    points = stacked(grids)
    x_T = samplers.initial_noise(points, KEY, (3, 2))
    made = {s: solvers.make(s, path) for s in NEW}

    @jax.jit
    def ends(points, x):
        return {
            s: samplers.sample(denoise, made[s], points, x, KEY, NO_COND)[0] for s in NEW
        }, denoise(x, points.t[0], NO_COND).x0

    found, estimate = ends(points, x_T)
    rounding = 1e-5 + 1e-6 * np.abs(x_T).max()
    for solver, x in found.items():
        assert np.isfinite(x).all(), solver
        np.testing.assert_allclose(x[0], estimate[0], atol=rounding, err_msg=solver)
    alone, _ = ends(Point(*(np.repeat(a[:, None], 3, 1) for a in grids[2])), x_T)
    for solver, x in alone.items():
        np.testing.assert_allclose(x[2], found[solver][2], atol=rounding, err_msg=solver)


def test_the_order_falls_at_the_end_where_the_number_of_steps_is_given():
    """To 1 in the last step, in a grid that ends in noise; the number of steps may be traced."""
    path = PATHS["cosine"]
    denoise, points = gaussian(path, MEAN, COV), samplers.grid(path, 8, "log_snr")
    points = Point(*(a[1:-1] for a in points))  # neither pure noise nor clean data
    x_T = jax.random.normal(KEY, (2, 2))

    @jax.jit
    def walk(points, steps):
        both = [solvers.dpm_solver(3, steps=steps), solvers.unipc(3, corrector=False, steps=steps)]
        return [samplers.sample(denoise, s, points, x_T, KEY, NO_COND)[0] for s in both]

    @jax.jit
    def euler(p, q, x):
        prediction = denoise(x, jnp.broadcast_to(p.t, 2), NO_COND)
        return multistep.first(x, prediction, p, q)

    p, q = (Point(*(a[i] for a in points)) for i in (-2, -1))
    short = Point(*(a[-3:] for a in points))
    # Of two steps the first has nothing to look back at, and the last is of order 1: both are Euler's.
    middle = euler(Point(*(a[0] for a in short)), Point(*(a[1] for a in short)), x_T)
    want = euler(p, q, middle)
    for got, full in zip(walk(short, 2), walk(short, 3), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
        assert np.abs(full - want).max() > 1e-3


def test_no_program_grows_with_the_number_of_steps():
    path = PATHS["scaled_linear"]
    denoise, made = gaussian(path, MEAN, COV), [solvers.make(name, path) for name in NAMES]

    def walk(points):
        x = jnp.ones((1, 2))
        return [samplers.sample(denoise, s, points, x, KEY, NO_COND)[0] for s in made]

    sizes = []
    for n in (8, 200):
        points = Point(*(jnp.linspace(a, b, n + 1) for a, b in ((1, 0), (0.1, 1), (1, 0))))
        sizes.append(occurrences(jax.make_jaxpr(walk)(points).jaxpr, ("mul", "add", "dot_general")))
    assert sizes[0] == sizes[1] > 100


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: solvers.dpm_solver(4), "no order=4 of this solver; the choices are 1, 2 and 3"),
        (lambda: solvers.lms(5), "no order=5 of LMS"),
        (lambda: solvers.unipc(4), "UniPC has no 4; the choices are"),
        (lambda: solvers.deis(3, "rho", 10), "leave out steps"),
        (lambda: solvers.make("unipcc", PATHS["edm"]), "no solver 'unipcc'; the choices are"),
        (lambda: solvers.make("lms", PATHS["edm"], eta=1), "has no option 'eta'; its options"),
    ],
)
def test_a_bad_option_raises_one_clear_sentence(act, message):
    with pytest.raises(ValueError, match=message):
        act()
