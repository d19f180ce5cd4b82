"""Several averages in one state, power-function averages, and what is made of them afterwards."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ldm_jax import build
from ldm_jax.build import updates
from ldm_jax.training import averages, checkpoints, loop, posthoc
from ldm_jax.training.posthoc import Profile
from tests import tiny
from tests.test_cli import sentence
from tests.test_loop import linear_run, on_devices, restored
from tests.test_step import setup
from tests.tiny import assert_equal, losses, quick_compiles  # noqa: F401 (a fixture)

MANY = (averages.fixed(0.9), averages.power(0.05), averages.power(0.1))

# --- profiles


@pytest.mark.parametrize(
    ("sigma_rel", "gamma"),
    # Karras et al. 2024 give 16.97 and 6.94. The rest are deviations of beta distributions (gamma + 1, 1).
    [
        (0.05, 16.97),
        (0.10, 6.94),
        (12**-0.5, 0),
        (18**-0.5, 1),
        ((3 / 80) ** 0.5, 2),
        ((4 / 150) ** 0.5, 3),
    ],
)
def test_exponents_of_widths(sigma_rel, gamma):
    assert posthoc.exponent(sigma_rel) == pytest.approx(gamma, abs=5e-3)
    assert posthoc.relative_width(posthoc.exponent(sigma_rel)) == pytest.approx(sigma_rel, rel=1e-9)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.3, float("nan")])
def test_what_is_no_width_is_refused(sigma_rel):
    with pytest.raises(ValueError, match=r"above 0 and at most 0\.288"):
        posthoc.exponent(sigma_rel)


def test_products_of_profiles_are_integrals():
    tau = (np.arange(200_000) + 0.5) / 200_000 * 40
    for a, b in (((40, 3.0), (40, 7.0)), ((25, 3.0), (40, 7.0)), ((40, 3.0), (10, 1.0))):
        density = [
            np.where(tau <= t, (gamma + 1) * (tau / t) ** gamma / t, 0.0) for t, gamma in (a, b)
        ]
        expected = np.mean(density[0] * density[1]) * 40
        assert posthoc.product(Profile(*a), Profile(*b)) == pytest.approx(expected, rel=1e-4)
        assert posthoc.product(Profile(*a), Profile(*b)) == posthoc.product(
            Profile(*b), Profile(*a)
        )


# --- what a step does


def tracked(average, theta):
    """The average after each of the rows of theta."""

    def body(held, inputs):
        held = average.move(held, *inputs)
        return held, held

    return jax.jit(lambda x: jax.lax.scan(body, x[0], (x, jnp.arange(len(x))))[1])(theta)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.25])
def test_a_power_function_average_is_the_integral_over_its_profile(sigma_rel):
    theta = np.random.default_rng(0).normal(size=(500, 4)).astype(np.float32)
    got = np.asarray(tracked(averages.power(sigma_rel), theta))
    power = posthoc.exponent(sigma_rel) + 1
    for t in (1, 2, 50, 500):
        shares = np.diff(
            (np.arange(t + 1) / t) ** power
        )  # of the steps; the integral of p over each
        np.testing.assert_allclose(got[t - 1], shares @ theta[:t], atol=2e-6)
    assert np.array_equal(got[0], theta[0])  # nothing of the start stays


def test_late_in_a_run_the_weight_of_a_step_is_not_lost_to_rounding():
    at, sigma_rel = 10_000_000, 0.05
    moved = averages.power(sigma_rel).move(jnp.zeros(()), jnp.ones(()), jnp.int32(at - 1))
    expected = -np.expm1((posthoc.exponent(sigma_rel) + 1) * np.log1p(-1 / at))
    np.testing.assert_allclose(moved, expected, rtol=1e-5)


def test_several_averages_are_those_of_runs_with_one():
    tx = optax.sgd(0.1)
    state, batch, alone = setup(tx, ema=0.9)
    _, _, many = setup(tx, ema=MANY)
    together = state.replace(ema=averages.start(MANY, state.params))
    theta = []
    for _ in range(3):
        state, _ = alone(state, 3.0, batch, jax.random.key(1))
        together, _ = many(together, 3.0, batch, jax.random.key(1))
        theta.append(state.params["net"]["w"])
    assert list(together.ema) == ["0.9", "power_0.05", "power_0.1"]
    assert_equal(together.params, state.params)
    assert_equal(together.ema["0.9"], state.ema)
    for average in MANY[1:]:
        expected = tracked(average, jnp.stack(theta))[-1]
        np.testing.assert_allclose(together.ema[average.name]["net"]["w"], expected, rtol=1e-6)
    bad = {"x": batch["x"].at[2, 1].set(jnp.nan)}
    after, _ = many(together, 3.0, bad, jax.random.key(1))
    assert_equal(after.ema, together.ema)


# --- what is made of them afterwards


@functools.cache
def trajectory(steps=2000):
    """Parameters that settle slowly, with noise: [steps 16], and the power-function averages of all steps."""
    rng = np.random.default_rng(1)
    drift = np.exp(-np.arange(steps)[:, None] / rng.uniform(50, 2000, 16)) * rng.normal(size=16)
    theta = (drift + 0.3 * rng.normal(size=(steps, 16))).astype(np.float32)
    return {
        s: np.asarray(tracked(averages.power(s), theta), np.float64)
        for s in (0.05, 0.08, 0.1, 0.15)
    }


@pytest.mark.parametrize(
    ("sigma_rel", "step", "limit"), [(0.08, 2000, 1e-3), (0.08, 1000, 2e-3), (0.15, 2000, 0.05)]
)
def test_a_width_that_was_not_tracked_is_made_of_those_that_were(sigma_rel, step, limit):
    every = range(50, step + 1, 50)
    kept = [(t, s) for t in every for s in (0.05, 0.1)]
    wanted = Profile(step, posthoc.exponent(sigma_rel))
    weights, off = posthoc.weights([Profile(t, posthoc.exponent(s)) for t, s in kept], wanted)
    held = trajectory()
    made = sum(w * held[s][t - 1] for w, (t, s) in zip(weights, kept, strict=True))
    direct, last = held[sigma_rel][step - 1], held[0.05][step - 1]
    assert off < limit
    error = np.linalg.norm(made - direct)
    assert error < limit * np.linalg.norm(direct)
    assert error < 0.2 * np.linalg.norm(last - direct)  # the nearest that was tracked is no match


def test_an_average_that_was_tracked_is_itself():
    kept = [Profile(t, posthoc.exponent(s)) for t in (10, 20, 30) for s in (0.05, 0.1)]
    weights, off = posthoc.weights(kept, kept[4])
    np.testing.assert_allclose(weights, np.eye(6)[4], atol=1e-6)
    assert off < 1e-6


# --- runs


def test_a_run_with_several_averages_goes_on_to_the_same_bits(tmp_path):
    run = linear_run(ema=MANY, **on_devices(2))
    loop.train(run, tmp_path / "whole")
    loop.train(run._replace(steps=4), tmp_path / "parts")
    loop.train(run, tmp_path / "parts")
    a, b = (restored(run, tmp_path / name) for name in ("whole", "parts"))
    assert_equal(a, b)
    assert losses(tmp_path / "whole")[-1] == losses(tmp_path / "parts")[-1]
    layouts = jax.tree.map(lambda leaf: leaf.sharding, a.params)
    for name in a.ema:
        held, at = checkpoints.load_ema(tmp_path / "whole", a.params, layouts, name=name)
        assert at == 8
        assert_equal(held, a.ema[name])
    assert len({float(of["net"]["w"][0]) for of in a.ema.values()}) == 3
    with pytest.raises(checkpoints.Unreadable, match=r"0\.5/net/w"):
        checkpoints.load_ema(tmp_path / "whole", a.params, layouts, name="0.5")


@pytest.fixture(scope="module")
def several():
    """The work directory of a model with two averages, of which the second is negative."""
    workdir, config = tiny.scratch() / "several", tiny.config_of("pixels")
    with config.ignore_type():
        config.optimizer.ema = dict(decays=(0.9,), power=(0.1,))
    run = build.run(config, workdir)
    with contextlib.closing(checkpoints.Checkpoints(workdir)) as saved:
        state, _ = loop.start_state(run, saved)
        state.ema["power_0.1"] = jax.tree.map(jnp.negative, state.ema["power_0.1"])
        saved.save(state)
    return workdir


def test_samples_are_of_the_average_that_is_named(several, capsys):
    first, second, named = (
        build.pipeline(several, ema=n).params for n in (None, "power_0.1", "0.9")
    )
    assert_equal(first, named)
    assert_equal(second, jax.tree.map(jnp.negative, first))
    argv = ("--workdir", several, "--ema", "power_0.2")
    assert tiny.call("sample", *argv) == 2
    assert sentence(capsys) == (
        "there is no average 'power_0.2'; did you mean 'power_0.1'? the choices are ['0.9', 'power_0.1']"
    )


@pytest.mark.parametrize(
    ("ema", "names"),
    [
        (0.99, None),
        ((0.999, 0.9999), ["0.999", "0.9999"]),
        (dict(power=(0.05, 0.10)), ["power_0.05", "power_0.1"]),
        (dict(decays=(0.5,), power=(0.1,)), ["0.5", "power_0.1"]),
    ],
)
def test_averages_of_a_config(ema, names):
    config = tiny.pixels()
    with config.ignore_type():
        config.optimizer.ema = ema
    found = updates.averages_of(config)
    assert (found if names is None else [a.name for a in found]) == (names or ema)
    assert updates.average_of(config) == (names and names[0])


@pytest.mark.parametrize(
    ("ema", "words"),
    [
        (1.5, "1.5 is no decay"),
        ((0.9, 1.0), "1.0 is no decay"),
        ((), "names no average"),
        ((0.9, 0.9), "names one average twice"),
        (dict(power=(0.4,)), "sigma_rel = 0.4 is no width"),
        (dict(decay=(0.4,)), "did you mean 'decays'"),
        (dict(power=0.1), "wrong type"),
    ],
)
def test_what_is_no_average_is_refused(ema, words):
    config = tiny.pixels()
    with config.ignore_type():
        config.optimizer.ema = ema
    with pytest.raises(ValueError, match=words):
        updates.averages_of(config)


def test_one_average_has_no_other_name():
    with pytest.raises(ValueError, match="keeps one alone, of the decay"):
        updates.average_of(tiny.pixels(), "0.99")


def test_groups_of_layers_in_a_config():
    config, params = tiny.pixels(), {"network": {"conv_in": {"kernel": jnp.zeros(3)}}}
    assert updates.groups_of(config, params) is False
    for rules in (True, ((".*/conv_in/.*", "first"), (".*", "rest"))):
        config.log.norms = rules
        build.workdir.check_config(config)
        assert updates.groups_of(config, params) == rules
        del config.log.norms
    config.log.norms = ((".*/conv_on/.*", "first"), (".*", "rest"))
    with pytest.raises(ValueError, match="conv_on"):
        updates.groups_of(config, params)
    config.log.norms = ("conv_in",)
    with pytest.raises(ValueError, match=r"neither True nor a list of \(regex, group\)"):
        updates.groups_of(config, params)
