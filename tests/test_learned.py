"""The learned variance: its ends, the bound that trains it in closed form, that it trains nothing else, sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion import (
    bound,
    guidance,
    learned,
    objectives,
    paths,
    process,
    samplers,
    solvers,
    targets,
    times,
    weightings,
)
from ldm_jax.types import Cond, Prediction
from tests.exact import NO_COND, PATHS

KEY = jax.random.key(0)
PATH = PATHS["linear"]
BETAS = np.linspace(1e-4, 0.02, 1000)
BAR = np.cumprod(1 - BETAS)


def test_the_variance_lies_between_its_ends():
    s = jnp.array([[-1.0, 0.0, 1.0]])
    found = learned.variance(s, 0.01, 0.04)
    np.testing.assert_allclose(found, [[0.01, 0.02, 0.04]], rtol=1e-5)
    with pytest.raises(ValueError, match="the network predicts none"):
        learned.variance(None, 0.01, 0.04)


@pytest.mark.parametrize("entry", [1, 2, 37, 999])
def test_a_term_of_the_bound_is_the_divergence_of_two_normals(entry):
    """In numpy's float64, by the formulas of Ho et al. 2020, eq. 7, and Nichol & Dhariwal 2021, eq. 15."""
    x0, estimate, s = (np.random.default_rng(i).standard_normal((1, 3, 2)) for i in range(3))
    beta, bar, before = BETAS[entry], BAR[entry], BAR[entry - 1]
    small = beta * (1 - before) / (1 - bar)
    log_variance = (1 + s) / 2 * np.log(beta) + (1 - s) / 2 * np.log(small)
    means = beta * np.sqrt(before) / (1 - bar) * (x0 - estimate)
    kl = (-1 + log_variance - np.log(small)) / 2
    kl = kl + (small + means**2) / (2 * np.exp(log_variance))
    found = step_bits(x0, estimate, s, entry)
    np.testing.assert_allclose(found, kl.mean() / np.log(2), rtol=2e-3)


def step_bits(x0, estimate, s, *entries):
    x0, estimate, s = (jnp.asarray(a, jnp.float32) for a in (x0, estimate, s))
    t = jnp.asarray(entries, jnp.float32) / 999
    return jax.jit(lambda *a: learned.step_bits(PATH, *a))(x0, estimate, s, t)


def test_the_last_term_is_the_decoder_s():
    x0 = jnp.array([[[-1.0], [0.2], [1.0]]])
    estimate = x0 + 0.003
    small = BETAS[1] * (1 - BAR[0]) / (1 - BAR[1])
    std = np.exp((0.75 * np.log(BETAS[0]) + 0.25 * np.log(small)) / 2)
    nats = bound.discretised()(x0, estimate, jnp.float32(std))
    found = step_bits(x0, estimate, jnp.full(x0.shape, 0.5), 0)
    np.testing.assert_allclose(found, nats.mean() / np.log(2), rtol=1e-3)


def test_gradients_are_finite_at_every_entry():
    """Also where only the other branch of the bound is well behaved: estimates far off, and exact."""
    entries = jnp.array([0, 1, 500, 999])
    x0 = jax.random.normal(KEY, (4, 8, 1))

    def total(s, off):
        t = entries / 999.0
        return learned.step_bits(PATH, x0, x0 + off, s, t).sum()

    for off in (0.0, 30.0):
        gradient = jax.jit(jax.grad(total))(jnp.zeros(x0.shape), off)
        assert np.isfinite(gradient).all()
        assert np.abs(gradient).max() > 0


class Network:
    """F = a x, s = b: what moves which parameter is plain."""

    def __init__(self, a, b):
        self.a, self.b = a, b

    def __call__(self, x, t, cond):
        return jnp.concatenate([self.a * x, jnp.full(x.shape, self.b)], -1)


def loss_of(weight, path=PATH):
    def loss(params):
        of = objectives.diffusion_loss(
            Network(*params),
            path,
            targets.eps(),
            times.discrete(PATH),
            weightings.uniform(),
            bound=weight,
        )
        return of(KEY, jax.random.normal(KEY, (16, 4, 2)), NO_COND)[0]

    return loss


def test_the_bound_moves_the_variance_alone():
    def plain(params):
        def network(x, t, cond):
            return params[0] * x

        of = objectives.diffusion_loss(
            network, PATH, targets.eps(), times.discrete(PATH), weightings.uniform()
        )
        return of(KEY, jax.random.normal(KEY, (16, 4, 2)), NO_COND)[0]

    params = (jnp.float32(0.7), jnp.float32(0.1))
    a, b = jax.jit(jax.grad(loss_of(0.001)))(params)
    np.testing.assert_allclose(a, jax.jit(jax.grad(plain))(params)[0], rtol=1e-5)
    twice = jax.jit(jax.grad(loss_of(0.002)))(params)[1]
    assert abs(float(b)) > 1e-6
    np.testing.assert_allclose(twice, 2 * b, rtol=1e-3)


def test_a_variance_and_its_loss_come_together():
    with pytest.raises(ValueError, match=r"nothing trains it; set objective.bound=0.001"):
        jax.eval_shape(loss_of(0.0), (1.0, 0.0))
    with pytest.raises(ValueError, match="this path has none; use the path ddpm"):
        jax.eval_shape(loss_of(0.001, paths.cosine(0.999)), (1.0, 0.0))
    of = objectives.diffusion_loss(
        lambda x, t, cond: x,
        PATH,
        targets.eps(),
        times.discrete(PATH),
        weightings.uniform(),
        bound=0.1,
    )
    with pytest.raises(ValueError, match="this network predicts none; set the network's variance"):
        jax.eval_shape(of, KEY, jnp.zeros((2, 4, 1)), NO_COND)
    with pytest.raises(ValueError, match="the network gives 3 channels for data of 2"):
        process.parted(jnp.zeros((1, 4, 3)), jnp.zeros((1, 4, 2)))


def walk(solver, spread):
    points = samplers.grid(PATH, 6, "linspace")

    def denoise(x, t, cond):
        p = Prediction(0.5 * x, 0.5 * x)
        return p if spread is None else p.replace(spread=jnp.full(x.shape, spread))

    x_T = jax.random.normal(KEY, (2, 5, 1))
    return samplers.sample(denoise, solver, points, x_T, KEY, NO_COND)[0]


def test_ancestral_steps_between_the_small_and_the_large_variance():
    for spread, name in ((-1.0, "small"), (1.0, "large")):
        wanted = walk(solvers.ddpm(name), None)
        np.testing.assert_allclose(
            walk(solvers.ddpm("learned"), spread), wanted, rtol=1e-3, atol=1e-5
        )
    assert np.isfinite(walk(solvers.ddpm("learned"), 1.5)).all()
    with pytest.raises(ValueError, match="take the solver ddpm with variance='small' or 'large'"):
        walk(solvers.ddpm("learned"), None)
    # Others do not notice it.
    np.testing.assert_array_equal(walk(solvers.ddim(), 0.3), walk(solvers.ddim(), None))


@pytest.mark.parametrize("batched", [True, False])
def test_guidance_keeps_the_variance_of_the_condition(batched):
    def denoise(x, t, cond):
        return Prediction(cond.vector[:, None] * x, x, 10 * cond.vector[:, None] + 0 * x)

    x, t = jnp.ones((2, 3, 1)), jnp.full(2, 0.5)
    cond, null = Cond(vector=jnp.array([[1.0], [2.0]])), Cond(vector=jnp.zeros((1, 1)))
    guided = guidance.cfg(denoise, null, 3.0, batched=batched)
    out = guided(x, t, cond)
    np.testing.assert_allclose(out.x0[:, 0, 0], [3.0, 6.0])
    np.testing.assert_allclose(out.spread[:, 0, 0], [10.0, 20.0])
    within = guidance.interval(guided, denoise, 0.4, 0.6)(x, t, cond)
    np.testing.assert_allclose(within.spread, out.spread)
