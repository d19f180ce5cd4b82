"""Guidance beyond the plain one: closed forms on Gaussians, hand-computed numbers, and what leaves all as it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion import blurring, conditions, finishes, gradients, guidance, samplers, solvers
from ldm_jax.diffusion.process import Path, add_noise, over
from ldm_jax.types import Cond, Prediction
from tests.exact import PATHS, gaussian

B, KEY = 3, jax.random.key(0)
PATH, FLOW = PATHS["cosine"], PATHS["rectified_flow"]
X = jax.random.normal(KEY, (B, 5, 4, 2))
T = jnp.array([0.3, 0.5, 0.8])
VAR = 0.4


def by_mean(path: Path, variance=VAR):
    """Data ~ N(cond.vector, variance): the exact denoiser."""

    def denoise(x_t, t, cond):
        alpha, sigma = over(path.alpha(t), x_t), over(path.sigma(t), x_t)
        mean = cond.vector[:, None, None]
        y, noisy = x_t - alpha * mean, alpha**2 * variance + sigma**2
        return Prediction(mean + alpha * variance / noisy * y, sigma / noisy * y)

    return denoise


def mean(*values):
    return Cond(vector=jnp.broadcast_to(jnp.array(values), (B, 2)))


COND, NULL = mean(0.8, -0.4), mean(0.1, 0.3)
MODEL = by_mean(PATH)


def close(got, want, **kwargs):
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, **({"rtol": 1e-4, "atol": 1e-5} | kwargs))


def same(got, want):
    for g, w in zip(got, want, strict=True):
        np.testing.assert_array_equal(g, w)


def test_guidance_of_gaussians_is_the_gaussian_of_the_powers():
    """p(x | y)^w p(x)^(1 - w) has the mean w m + (1 - w) m0 where both have one variance."""
    w = jnp.array([3.0, 0.5, 7.5])
    wanted = Cond(vector=w[:, None] * COND.vector + (1 - w[:, None]) * NULL.vector)
    want = MODEL(X, T, wanted)
    close(guidance.cfg(MODEL, NULL, w)(X, T, COND), want)
    close(guidance.cfg(MODEL, NULL, w, batched=False)(X, T, COND), want)


def test_and_of_gaussians():
    """p(x) prod_i (p(x | y_i) / p(x))^w_i."""
    others, scales = (mean(-0.5, 0.2), mean(0.3, 0.9)), (2.0, 1.5, jnp.array([-0.5, 0.0, 1.0]))
    shift = sum(
        jnp.reshape(s, (-1, 1)) * (c.vector - NULL.vector)
        for s, c in zip(scales, (COND, *others), strict=True)
    )
    want = MODEL(X, T, Cond(vector=NULL.vector + shift))
    for batched in (True, False):
        made = guidance.compose(MODEL, others, NULL, scales, batched)
        close(made(X, T, COND), want)
    with pytest.raises(ValueError, match="2 scales for the condition and 2 others"):
        guidance.compose(MODEL, others, NULL, (1.0, 2.0))


def test_blended_prompts():
    other = mean(-1.0, 2.0)
    between = MODEL(X, T, Cond(vector=0.25 * COND.vector + 0.75 * other.vector))
    close(guidance.mix(MODEL, (other,), (1.0, 3.0))(X, T, COND), between)
    close(MODEL(X, T, conditions.blend((COND, other), (1.0, 3.0))), between)
    # Tokens: where one text is shorter, the other's count alone; a sample's weights are its own.
    tokens = jax.random.normal(KEY, (2, B, 4, 3))
    short = Cond(tokens=tokens[0, :1, :2])
    long = Cond(tokens=tokens[1], mask=jnp.arange(4) < jnp.array([[1], [3], [4]]))
    got = conditions.blend((short, long), (jnp.array([1.0, 1.0, 0.0]), 1.0))
    want = np.array(tokens[1])
    want[:2, 0] = (tokens[0, 0, 0] + tokens[1, :2, 0]) / 2
    want[0, 1] = tokens[0, 0, 1]
    want[1, 1] = (tokens[0, 0, 1] + tokens[1, 1, 1]) / 2
    np.testing.assert_array_equal(got.mask, [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]])
    counted = np.array(got.mask)
    np.testing.assert_allclose(got.tokens[counted], want[counted], rtol=1e-6)
    with pytest.raises(ValueError, match="2 conditions and 1 weights"):
        conditions.blend((COND, other), (1.0,))


def test_autoguidance():
    weak = by_mean(PATH, 2 * VAR)
    close(guidance.autoguidance(MODEL, MODEL, 4.0)(X, T, COND), MODEL(X, T, COND))
    same(guidance.autoguidance(MODEL, weak, 1.0)(X, T, COND), MODEL(X, T, COND))
    got = guidance.autoguidance(MODEL, weak, 3.0)(X, T, COND)
    # Of the scores: the product N(m, v)^3 N(m, 2 v)^-2 at each noise level.
    a, s = (np.asarray(f(T)).reshape(-1, 1, 1, 1) for f in (PATH.alpha, PATH.sigma))
    strong, less = a**2 * VAR + s**2, 2 * a**2 * VAR + s**2
    y = X - a * COND.vector[:, None, None]
    np.testing.assert_allclose(got.eps, s * y * (3 / strong - 2 / less), rtol=1e-4, atol=1e-5)
    beside = guidance.cfg(MODEL, NULL, 2.0, finishes.further(weak, 3.0))(X, T, COND)
    plain = guidance.cfg(MODEL, NULL, 2.0)(X, T, COND)
    for b, p, g, m in zip(beside, plain, got, MODEL(X, T, COND), strict=True):
        np.testing.assert_allclose(b, p + 1.5 * (g - m), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("path", [PATH, FLOW], ids=["cosine", "flow"])
def test_gradients_of_an_exact_likelihood_give_the_exact_posterior(path):
    """x0 ~ N(0, 1), y = x0 + noise of variance r."""
    r, y = 0.5, jnp.array([0.7, -1.2])
    prior, null = by_mean(path, 1.0), mean(0.0, 0.0)
    posterior = by_mean(path, r / (1 + r))
    want = posterior(X, T, Cond(vector=jnp.broadcast_to(y / (1 + r), (B, 2))))

    def of_x0(x0, t):
        unsure = path.sigma(t) ** 2 / (path.alpha(t) ** 2 + path.sigma(t) ** 2)
        return -((y - x0) ** 2 / 2 / over(unsure + r, x0)).sum((1, 2, 3))

    def of_x_t(x_t, t):
        return of_x0(prior(x_t, t, null).x0, t)

    for made in (
        gradients.by_classifier(prior, path, of_x_t, 1.0),
        gradients.by_estimate(prior, path, of_x0, 1.0),
        gradients.by_estimate(prior, path, of_x0, jnp.ones(B), through=False),
    ):
        got = made(X, T, null)
        close(got, want, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(add_noise(path, *got, T), X, rtol=1e-4, atol=1e-4)
    noise = jnp.ones(B)  # pure noise on the flow, where alpha is zero
    for make in (gradients.by_classifier, gradients.by_estimate):
        same(make(prior, path, of_x_t, 0.0)(X, T, null), prior(X, T, null))
        assert np.isfinite(make(prior, FLOW, of_x0, 5.0)(X, noise, null).x0).all()


def constant(x0):
    """A denoiser that always sees this."""
    return lambda x_t, t, cond: Prediction(
        x0, (x_t - over(PATH.alpha(t), x_t) * x0) / over(PATH.sigma(t), x_t)
    )


def test_dynamic_thresholding():
    x0 = jnp.linspace(-4, 3, X.size).reshape(X.shape)
    q, got = {}, {}
    for share, limit, most in ((0.9, 1.0, np.inf), (0.9, 1.5, np.inf), (0.9, 1.0, 1.7)):
        finish = finishes.threshold(PATH, jnp.full(B, share), limit, most)
        got = guidance.finished(constant(x0), finish)(X, T, COND)
        q = np.quantile(np.abs(np.asarray(x0, np.float64)).reshape(B, -1), share, axis=1)
        s = np.maximum(np.minimum(q, most), limit).reshape(B, 1, 1, 1)
        np.testing.assert_allclose(got.x0, np.clip(x0, -s, s) * limit / s, rtol=1e-5)
        np.testing.assert_allclose(add_noise(PATH, *got, T), X, rtol=1e-4, atol=1e-4)
    assert len(set(q)) == B  # each sample has its own bound


def test_projected_guidance():
    c, u = np.zeros((2, *X.shape), np.float32)
    c[:, 0, 0, 0] = 2.0
    u[:, 0, 0, 0], u[:, 1, 0, 0] = -1.0, -4.0  # the difference is 3 along c and 4 across
    c, u = jnp.asarray(c), jnp.asarray(u)
    parts = finishes.Parts(
        X, T, COND, jnp.float32(5.0), constant(c)(X, T, COND), constant(u)(X, T, COND), None
    )
    out = guidance.combine((5.0, -4.0), (parts.positive, parts.negative))
    for eta, radius, along, across in (
        (0.0, np.inf, 0.0, 4.0),
        (0.5, np.inf, 1.5, 4.0),
        (0.0, 2.5, 0.0, 2.0),
        (1.0, 2.5, 1.5, 2.0),
    ):
        got = finishes.apg(PATH, eta, radius)(parts._replace(out=out))
        np.testing.assert_allclose(got.x0[:, 0, 0, 0], 2 + 4 * along, rtol=1e-5)
        np.testing.assert_allclose(got.x0[:, 1, 0, 0], 4 * across, rtol=1e-5)
        np.testing.assert_allclose(add_noise(PATH, *got, T), X, rtol=1e-3, atol=1e-3)


def test_the_optimized_scale_of_velocities():
    """With v(cond) = 2 v(null) the two agree but for their length: every scale gives v(cond)."""

    def denoise(x_t, t, cond):
        v = cond.vector[:, :1, None, None] * jnp.tanh(x_t)  # of a straight path: x0 = x_t - t v
        return Prediction(x_t - over(t, x_t) * v, x_t + over(1 - t, x_t) * v)

    got = guidance.cfg(denoise, mean(1.0, 0.0), 6.0, finishes.zero_star(FLOW))(X, T, mean(2.0, 0))
    close(got, denoise(X, T, mean(2.0, 0)), atol=1e-4)
    model = by_mean(FLOW)
    finish = finishes.zero_star(FLOW)
    got = guidance.cfg(model, NULL, jnp.array([2.0, 3.0, 4.0]), finish)(X, T, COND)
    v, null = (np.asarray(p.eps - p.x0) for p in (model(X, T, COND), model(X, T, NULL)))
    s = (v * null).sum((1, 2, 3), keepdims=True) / (null**2).sum((1, 2, 3), keepdims=True)
    w = np.array([2.0, 3.0, 4.0]).reshape(-1, 1, 1, 1)
    np.testing.assert_allclose(got.eps - got.x0, w * v + (1 - w) * s * null, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(add_noise(FLOW, *got, T), X, rtol=1e-4, atol=1e-4)


def test_the_first_steps_can_be_left_out():
    points = samplers.grid(FLOW, 4)
    model = by_mean(FLOW)
    made = guidance.interval(guidance.still(FLOW), model, points.t[2], jnp.inf)
    x, kept = samplers.sample(made, solvers.euler(), points, X, KEY, COND, keep=("x", "x0"))
    want, _ = samplers.sample(
        model, solvers.euler(), jax.tree.map(lambda a: a[2:], points), X, KEY, COND
    )
    np.testing.assert_allclose(kept[0][2], X, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(x, want, rtol=1e-4, atol=1e-5)
    assert kept[1].shape == (4, *X.shape)
    p = guidance.still(PATH)(X, T, COND)  # the velocity is zero on any path
    v = [jax.jvp(f, (T,), (jnp.ones(B),))[1].reshape(-1, 1, 1, 1) for f in (PATH.alpha, PATH.sigma)]
    np.testing.assert_allclose(v[0] * p.x0 + v[1] * p.eps, 0, atol=1e-5)
    np.testing.assert_allclose(add_noise(PATH, *p, T), X, rtol=1e-5, atol=1e-5)


def attention(x_t, t, cond):
    """A prediction, and that the upper left corner is looked at."""
    seen = jnp.zeros((len(x_t), 3, 2)).at[:, 0, 0].set(6.0)
    return by_mean(PATH)(x_t, t, cond), seen


def test_blurring_where_the_network_looks():
    spot = jnp.zeros((1, 11, 12, 1)).at[0, 5, 6].set(1.0)
    weights = np.exp(-(np.arange(-4, 5) ** 2) / 2 / 1.2**2)
    weights /= weights.sum()
    blurred = blurring.blur(spot, 1.2)
    np.testing.assert_allclose(blurred[0, 1:10, 2:11, 0], np.outer(weights, weights), atol=1e-6)
    np.testing.assert_allclose(blurring.blur(jnp.ones((1, 5, 6, 7, 2))), 1.0, rtol=1e-6)
    looked = attention(X, T, COND)[1]
    got = blurring.degraded(X, looked)
    inside = np.zeros((B, 5, 4), bool)
    inside[:, :2, :2] = True  # of 5 rows two have their middle in the first third
    np.testing.assert_array_equal(got[~inside], X[~inside])
    np.testing.assert_array_equal(got[inside], blurring.blur(X)[inside])


def test_self_attention_guidance():
    got = blurring.sag(attention, PATH, 2.0)(X, T, COND)
    plain = MODEL(X, T, COND)
    worse = MODEL(
        add_noise(PATH, blurring.degraded(plain.x0, attention(X, T, COND)[1]), plain.eps, T),
        T,
        COND,
    )
    np.testing.assert_allclose(got.eps, plain.eps + 2 * (plain.eps - worse.eps), atol=1e-5)
    np.testing.assert_allclose(add_noise(PATH, *got, T), X, rtol=1e-4, atol=1e-4)
    # Beside classifier-free guidance the blurred picture is the null condition's.
    both = blurring.sag(attention, PATH, 2.0, NULL, 3.0)(X, T, COND)
    null = blurring.sag(attention, PATH, 2.0)(X, T, NULL)
    cfg = guidance.cfg(MODEL, NULL, 3.0)(X, T, COND)
    want = cfg.eps + null.eps - MODEL(X, T, NULL).eps
    np.testing.assert_allclose(both.eps, want, rtol=1e-4, atol=1e-4)


def test_neutral_settings_change_no_bit():
    plain = guidance.cfg(MODEL, NULL, 3.0)
    want, small = plain(X, T, COND), MODEL(X / 9, T, NULL)
    assert max(np.abs(small.x0).max(), 0) < 1
    for name, finish in {
        "rescale": finishes.rescale(PATH, 0.0),
        "apg": finishes.apg(PATH, 1.0),
        "further": finishes.further(by_mean(PATH, 1.0), 0.0),
        "threshold": finishes.threshold(PATH, 0.99, 1e3),
    }.items():
        for g, w in zip(guidance.cfg(MODEL, NULL, 3.0, finish)(X, T, COND), want, strict=True):
            np.testing.assert_array_equal(g, w, err_msg=name)
    same(guidance.finished(MODEL, finishes.threshold(PATH, 0.99))(X / 9, T, NULL), small)
    same(guidance.cfg(MODEL, NULL, 1.0, finishes.zero_star(PATH))(X, T, COND), MODEL(X, T, COND))
    same(guidance.compose(MODEL, (), NULL, (3.0,))(X, T, COND), want)
    same(guidance.mix(MODEL, (), (3.0,))(X, T, COND), MODEL(X, T, COND))
    same(guidance.edit(MODEL, NULL, NULL, 1.0, 1.0)(X, T, COND), MODEL(X, T, COND))
    same(guidance.interval(plain, MODEL, -1.0, 2.0)(X, T, COND), want)
    same(guidance.interval(plain, MODEL, 2.0, 3.0)(X, T, COND), MODEL(X, T, COND))
    same(blurring.sag(attention, PATH, 0.0, NULL, 3.0)(X, T, COND), want)
    same([conditions.blend((COND,), (3.0,)).vector], [COND.vector])


def test_a_gaussian_with_covariance_is_sampled_by_its_power():
    """The same by sampling: deterministic steps end at the scaled mean when they start at the mean."""
    m, cov = np.array([0.5, -0.3]), np.array([[0.6, 0.25], [0.25, 0.3]])

    def denoise(x_t, t, cond):
        shift = over(cond.vector[:, 0], x_t)
        shifted = gaussian(PATH, m, cov)(x_t - over(PATH.alpha(t), x_t) * shift, t, cond)
        return Prediction(shifted.x0 + shift, shifted.eps)

    cond, null = Cond(vector=jnp.ones((1, 1))), Cond(vector=jnp.zeros((1, 1)))
    points = samplers.grid(PATH, 20)
    x_T = points.alpha[0] * jnp.asarray(m + 3.0)[None]
    made = guidance.cfg(denoise, null, 3.0)
    x, _ = samplers.sample(made, solvers.ddim(), points, x_T.astype(jnp.float32), KEY, cond)
    np.testing.assert_allclose(x[0], m + 3.0, rtol=1e-4)
