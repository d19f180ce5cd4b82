import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from ldm_jax.models import vq
from ldm_jax.models.autoencoder import Gaussian
from ldm_jax.training import autoencoder_loss as losses
from ldm_jax.training import bottleneck, codebook
from tests.drawn import drawn

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
    options = dict(disc_start=5, disc_weight=0.7)
    return losses.autoencoder_loss(gaussian(0.1), CRITIC, **(options | kwargs))


def gaussian(kl_weight=1e-6):
    return bottleneck.gaussian(MODEL, kl_weight)


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
    loss = losses.autoencoder_loss(gaussian(0.3), kind=kind)
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
        losses.autoencoder_loss(gaussian(), kind="l3")


def test_before_its_start_the_discriminator_is_not_there():
    value, metrics = value_of(adversarial(), step=4)
    alone = losses.autoencoder_loss(gaussian(0.1))
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
    plain = losses.autoencoder_loss(gaussian())
    with_term = losses.autoencoder_loss(gaussian(), perceptual=perceptual, perceptual_weight=0.5)
    extra = value_of(with_term, gen, frozen=3.0)[0] - value_of(plain, gen)[0]
    y = reconstruction()[0]
    # 48 elements x 0.5 x 3 x the mean square of a sample, on average
    expected = 0.5 * 3.0 * np.square(np.asarray(X - y)).sum((1, 2, 3)).mean()
    np.testing.assert_allclose(extra, expected, rtol=1e-4)


# ---- normalisations, codes -----------------------------------------------------------------------


def of_kl(name, x):
    """Value, size of a sample and of its latents, mean |x - x̂| and KL, by the encoder's means."""
    loss = losses.autoencoder_loss(gaussian(0.3), normalization=name)
    value, metrics = loss({"gen": PARAMS["gen"]}, None, {"x": x}, RNG, 0)
    return float(value), x[0].size, float(metrics["reconstruction"]), float(metrics["kl"])


def test_the_normalisations_by_name():
    """CompVis' sums and means, and the sums per element of the data; a sample of 48 elements has 32 latents."""
    value, size, mean, kl = of_kl("sum", X)
    np.testing.assert_allclose(value, size * mean + 0.3 * kl, rtol=1e-5)
    np.testing.assert_allclose(of_kl("mean", X)[0], mean + 0.3 * kl / 32, rtol=1e-5)
    np.testing.assert_allclose(of_kl("element", X)[0], value / size, rtol=1e-5)


@pytest.mark.parametrize(("name", "grows"), [("sum", 4), ("mean", 1), ("element", 1)])
def test_only_the_sums_grow_with_the_size_of_the_pictures(name, grows):
    constant = jnp.broadcast_to(X[:, :1, :1], X.shape)
    large = jnp.tile(constant, (1, 2, 2, 1))
    loss = losses.autoencoder_loss(bottleneck.gaussian(Certain(), 0.3), normalization=name)
    gen = {"gen": PARAMS["gen"]}
    one, four = (loss(gen, None, {"x": x}, RNG, 0)[0] for x in (constant, large))
    np.testing.assert_allclose(four, grows * one, rtol=1e-5)


class Certain(Linear):
    """With a posterior so narrow that its noise does not count."""

    def encode(self, x):
        mean = jnp.split(self.encoder(x), 2, axis=-1)[0]
        return Gaussian(mean, jnp.full_like(mean, -30.0))


def test_an_unknown_normalisation_is_refused():
    with pytest.raises(ValueError, match="choose among \\['element', 'mean', 'sum'\\]"):
        losses.autoencoder_loss(gaussian(), normalization="compvis")


CODES = vq.VQAutoencoder(
    width=4, mults=(1,), blocks=1, z_channels=2, embed=2, codes=6, groups=2, middle_attention=False
)


@functools.cache
def of_codes(rule=None, **kwargs):
    """Loss and parameters of a small VQ autoencoder on X."""
    params = {"gen": drawn(CODES, X)["params"]}
    between = bottleneck.quantized(CODES, rule=rule, **kwargs)
    return losses.autoencoder_loss(between, normalization="mean"), params


def test_the_vq_loss_is_the_means_of_the_original():
    """|x - x̂| + w (|sg z - e|² beta + |z - sg e|²), all as means, from the network's own reading of a batch."""
    loss, params = of_codes(codebook_weight=0.5, beta=0.3)
    value, metrics = loss(params, None, {"x": X}, RNG, 0)
    y, codes = CODES.apply({"params": params["gen"]}, X)
    between = np.square(np.asarray(codes.latents - codes.entries)).mean()
    expected = np.abs(np.asarray(X - y)).mean() + 0.5 * 1.3 * between
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["commitment"], between, rtol=1e-5)
    chosen = np.bincount(np.asarray(codes.indices).ravel(), minlength=6) / codes.indices.size
    np.testing.assert_allclose(metrics["usage"], np.mean(chosen > 0), rtol=1e-6)
    entropy = -sum(p * np.log(p) for p in chosen if p)
    np.testing.assert_allclose(metrics["perplexity"], np.exp(entropy), rtol=1e-5)


def test_a_codebook_that_is_an_average_has_no_gradient_and_tells_what_was_chosen():
    loss, params = of_codes(rule=codebook.average())

    def with_codebook(entries):
        return loss({"gen": params["gen"] | {"codebook": entries}}, None, {"x": X}, RNG, 0)

    gradient, metrics = jax.grad(with_codebook, has_aux=True)(params["gen"]["codebook"])
    np.testing.assert_array_equal(gradient, np.zeros_like(gradient))
    _, codes = CODES.apply({"params": params["gen"]}, X)
    z, indices = (np.asarray(a) for a in (codes.latents, codes.indices))
    for k in range(6):
        of_k = z[indices == k]
        np.testing.assert_allclose(
            metrics["_chosen"].shares[k], len(of_k) / indices.size, rtol=1e-5
        )
        sums = of_k.sum(0) / indices.size
        np.testing.assert_allclose(metrics["_chosen"].sums[k], sums, rtol=1e-4, atol=1e-6)
    rows = z.reshape(-1, 2)
    for latent in np.asarray(metrics["_chosen"].latents):
        assert np.abs(rows - latent).sum(1).min() < 1e-5
    by_gradient, _ = of_codes()
    value = by_gradient(params, None, {"x": X}, RNG, 0)[0]
    less = loss(params, None, {"x": X}, RNG, 0)[0]
    # Legacy: the commitment counts once and the entries beta; here beta times the commitment is all there is.
    np.testing.assert_allclose(value - less, metrics["commitment"], rtol=1e-4)
