import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from ldm_jax.models.autoencoder import Gaussian
from ldm_jax.training import autoencoder_loss as losses

DECODER = losses.LAST_KERNEL[0]


class Decoder(nn.Module):
    @nn.compact
    def __call__(self, z):
        h = nn.tanh(nn.Dense(5, name="conv_in")(z))
        return nn.Dense(3, name="conv_out")(h)


class Linear(nn.Module):
    """The smallest autoencoder with the parameters and methods that the loss needs."""

    def setup(self):
        self.encoder = nn.Dense(4)
        self.decoder = Decoder()

    def encode(self, x):
        mean, logvar = jnp.split(self.encoder(x), 2, axis=-1)
        return Gaussian(mean, logvar)

    def decode(self, z):
        return self.decoder(z)

    def __call__(self, x, rng):
        return self.decode(self.encode(x).sample(rng))


class Critic(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1, name="out")(nn.tanh(nn.Dense(4, name="in")(x)))


MODEL, CRITIC = Linear(), Critic()
X = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
PARAMS = {
    "gen": MODEL.init(jax.random.key(1), X, jax.random.key(2))["params"],
    "disc": CRITIC.init(jax.random.key(3), X)["params"],
}
RNG = jax.random.key(4)


def value_of(loss, params=PARAMS, step=0, frozen=None):
    return loss(params, frozen, {"x": X}, RNG, step)


def gradient_of(loss, step=0, params=PARAMS):
    return jax.grad(lambda p: value_of(loss, p, step)[0])(params)


@functools.cache
def adversarial(**kwargs):
    options = dict(disc_start=5, disc_weight=0.7, kl_weight=0.1)
    return losses.autoencoder_loss(MODEL, CRITIC, **(options | kwargs))


def reconstruction(params=PARAMS):
    posterior = MODEL.apply({"params": params["gen"]}, X, method="encode")
    z = posterior.sample(RNG)
    return MODEL.apply({"params": params["gen"]}, z, method="decode"), posterior


def score(params, x):
    return CRITIC.apply({"params": params["disc"]}, x)


def largest(tree):
    return max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree))


def assert_close(a, b, rtol=1e-4):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-6), a, b)


def test_hinge_values():
    real, fake = jnp.array([2.0, 0.5, -1.0]), jnp.array([-2.0, 0.0, 3.0])
    # max(0, 1 - real) = 0, 1/2, 2 and max(0, 1 + fake) = 0, 1, 4
    np.testing.assert_allclose(
        losses.hinge_discriminator(real, fake), 0.5 * (2.5 / 3 + 5 / 3), rtol=1e-6
    )
    assert float(losses.hinge_discriminator(jnp.full(3, 2.0), jnp.full(3, -2.0))) == 0.0


@pytest.mark.parametrize(("kind", "distance"), [("l1", np.abs), ("l2", np.square)])
def test_without_a_discriminator_it_is_distance_plus_kl(kind, distance):
    loss = losses.autoencoder_loss(MODEL, kind=kind, kl_weight=0.3)
    value, metrics = value_of(loss, {"gen": PARAMS["gen"]})
    y, posterior = reconstruction()
    mean, var = np.asarray(posterior.mean), np.exp(np.asarray(posterior.logvar))
    kl = 0.5 * np.sum(mean**2 + var - 1 - np.log(var), axis=(1, 2, 3)).mean()
    nll = distance(np.asarray(X - y)).sum((1, 2, 3)).mean()
    np.testing.assert_allclose(value, nll + 0.3 * kl, rtol=1e-5)
    np.testing.assert_allclose(metrics["kl"], kl, rtol=1e-5)
    np.testing.assert_allclose(metrics["reconstruction"], nll / X[0].size, rtol=1e-5)


def test_an_unknown_distance_is_refused():
    with pytest.raises(ValueError, match="'l1' or 'l2'"):
        losses.autoencoder_loss(MODEL, kind="l3")


def test_before_its_start_the_discriminator_is_not_there():
    value, metrics = value_of(adversarial(), step=4)
    alone = losses.autoencoder_loss(MODEL, kl_weight=0.1)
    np.testing.assert_allclose(value, value_of(alone, {"gen": PARAMS["gen"]})[0], rtol=1e-6)
    assert [float(metrics[k]) for k in ("disc_weight", "generator", "discriminator")] == [0, 0, 0]
    gradient = gradient_of(adversarial(), step=4)
    assert largest(gradient["disc"]) == 0
    assert largest(gradient["gen"]) > 0
    assert largest(gradient_of(adversarial(), step=5)["disc"]) > 0


def test_the_adaptive_weight_is_the_ratio_of_gradients_at_the_last_kernel():
    """Esser et al. 2021, eq. 7, by differentiating both losses as functions of that kernel."""
    z = reconstruction()[1].sample(RNG)

    def decoded(kernel):
        gen = {**PARAMS["gen"], DECODER: dict(PARAMS["gen"][DECODER])}
        gen[DECODER]["conv_out"] = {**gen[DECODER]["conv_out"], "kernel": kernel}
        return MODEL.apply({"params": gen}, z, method="decode")

    def nll(kernel):
        return jnp.abs(X - decoded(kernel)).sum((1, 2, 3)).mean()

    def generator(kernel):
        return -score(PARAMS, decoded(kernel)).mean()

    kernel = PARAMS["gen"][DECODER]["conv_out"]["kernel"]
    above, below = (jnp.linalg.norm(jax.grad(f)(kernel)) for f in (nll, generator))
    _, metrics = value_of(adversarial(), step=5)
    np.testing.assert_allclose(metrics["disc_weight"], above / (below + 1e-4), rtol=1e-5)
    np.testing.assert_allclose(metrics["generator"], generator(kernel), rtol=1e-5)


@pytest.mark.parametrize(
    ("reconstruction", "generator", "weight"),
    [(3.0, 4.0, 0.75), (1.0, 0.0, 1e4), (2e9, 1.0, 1e4), (np.nan, 1.0, 0), (1.0, np.inf, 0), (np.inf, 1.0, 0)],
)  # fmt: skip
def test_the_weight_is_clipped_and_never_nan(reconstruction, generator, weight):
    found = losses.adaptive_weight(
        lambda cotangent: (cotangent,), jnp.array([reconstruction]), jnp.array([generator])
    )
    np.testing.assert_allclose(found, weight, rtol=1e-3)


def test_each_player_sees_its_own_loss_only():
    """The gradients of both players out of one backward pass equal those of two separate losses."""
    gradient = gradient_of(adversarial(), step=5)
    weight = value_of(adversarial(), step=5)[1]["disc_weight"]
    fixed = reconstruction()[0]

    def of_discriminator(disc):
        params = {"disc": disc}
        real, fake = score(params, X), score(params, fixed)
        return 0.5 * (jnp.maximum(0, 1 - real).mean() + jnp.maximum(0, 1 + fake).mean())

    def of_generator(gen):
        y, posterior = reconstruction({"gen": gen})
        nll = jnp.abs(X - y).sum((1, 2, 3)).mean()
        return nll + 0.1 * posterior.kl().mean() - weight * 0.7 * score(PARAMS, y).mean()

    assert_close(gradient["disc"], jax.grad(of_discriminator)(PARAMS["disc"]))
    assert_close(gradient["gen"], jax.grad(of_generator)(PARAMS["gen"]))


def test_the_perceptual_term_is_per_sample_and_counts_as_all_its_elements():
    def perceptual(arrays, x, y):
        return arrays * jnp.square(x - y).mean((1, 2, 3))

    gen = {"gen": PARAMS["gen"]}
    plain = losses.autoencoder_loss(MODEL)
    with_term = losses.autoencoder_loss(MODEL, perceptual=perceptual, perceptual_weight=0.5)
    extra = value_of(with_term, gen, frozen=3.0)[0] - value_of(plain, gen)[0]
    y = reconstruction()[0]
    # 48 elements x 0.5 x 3 x the mean square of a sample, on average
    expected = 0.5 * 3.0 * np.square(np.asarray(X - y)).sum((1, 2, 3)).mean()
    np.testing.assert_allclose(extra, expected, rtol=1e-4)
