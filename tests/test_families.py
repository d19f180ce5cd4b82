"""The losses of the families that the benchmark compares, and the benchmark itself for a second each."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from ldm_jax import media
from ldm_jax.data.shapes import shapes_dataset_builder, vocabulary
from ldm_jax.measure import families
from ldm_jax.measure.gan import gan_loss
from ldm_jax.measure.vae import vae_loss
from ldm_jax.models.autoencoder import Gaussian
from tests.test_quality import random_network
from tests.tiny import quick_compiles  # noqa: F401 (a fixture of this module)

X = np.random.default_rng(0).uniform(-1, 1, (8, 4, 4, 3)).astype(np.float32)
KEY = jax.random.key(0)


class Scaling(nn.Module):
    """One number a way."""

    def setup(self):
        self.there, self.back = (self.param(n, nn.initializers.ones, ()) for n in ("there", "back"))

    def encode(self, x):
        return Gaussian(self.there * x, jnp.full_like(x, -20.0))

    def decode(self, z):
        return self.back * z


def test_the_vae_s_loss_is_the_bound_of_the_best_decoder():
    """Its gradient is that of |x - x̂|^2 / (2 s^2) + KL with the variance s^2 of the errors, held still."""
    params = {"gen": {"there": jnp.float32(0.5), "back": jnp.float32(0.6)}}
    loss = vae_loss(Scaling())

    def value(params):
        return loss(params, {}, {"x": X}, KEY, 0)[0]

    error = np.square(X - 0.3 * X).mean()
    kl = 0.5 * (np.square(0.5 * X) + np.exp(-20.0) - 1 + 20.0).mean()
    assert value(params) == pytest.approx(0.5 * np.log(error) + kl, rel=1e-4)
    found = jax.grad(value)(params)["gen"]
    assert found["back"] == pytest.approx(-0.5 * 0.7 * np.square(X).mean() / error, rel=1e-3)


class Linear(nn.Module):
    """A picture's score is its product with one picture."""

    @nn.compact
    def __call__(self, x):
        weights = self.param("weights", nn.initializers.normal(0.1), x.shape[1:])
        return (x * weights).sum((1, 2, 3))[:, None, None, None]


def test_each_player_of_the_gan_follows_its_own_loss():
    judge, r1 = Linear(), 0.7
    weights = judge.init(KEY, X)["params"]["weights"]
    params = {"gen": {"back": jnp.float32(0.6), "there": 0.0}, "disc": {"weights": weights}}
    loss = gan_loss(Scaling(), judge, X.shape[1:], r1)

    def value(params):
        return loss(params, {}, {"x": X}, KEY, 0)

    (_, told), found = jax.value_and_grad(value, has_aux=True)(params)
    assert told["penalty"] == pytest.approx(float(jnp.square(weights).sum()), rel=1e-5)
    z = jax.random.normal(KEY, X.shape)
    fools = -np.mean(np.sum(z * weights, axis=(1, 2, 3)))  # a unit of `back`
    assert found["gen"]["back"] == pytest.approx(float(fools), rel=1e-4)

    def alone(weights):
        real, fake = ((x * weights).sum((1, 2, 3)) for x in (X, 0.6 * z))
        hinge = 0.5 * (nn.relu(1 - real).mean() + nn.relu(1 + fake).mean())
        return hinge + 0.5 * r1 * jnp.square(weights).sum()

    np.testing.assert_allclose(found["disc"]["weights"], jax.grad(alone)(weights), rtol=1e-4)


def flagged(**given):
    for name in families.FLAGS:
        families.FLAGS[name].unparse()
    families.FLAGS(["benchmark", *(f"--{name}={value}" for name, value in given.items())])


def test_what_is_not_there_is_told_before_any_training(tmp_path):
    flagged()
    with pytest.raises(ValueError, match="--features is missing"):
        families.prepare()
    flagged(features="shapes:x", only="VAE,GAM")
    with pytest.raises(ValueError, match="no family 'GAM'; choose among"):
        families.prepare()
    flagged(features="shapes:x", data_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"python -m ldm_jax.data.shapes"):
        families.prepare()


@pytest.mark.slow
def test_a_family_is_trained_drawn_and_judged(tmp_path, capsys, monkeypatch):
    world = vocabulary.SIMPLE._replace(splits={"train": 90, "validation": 80, "unseen": 4})
    of, small = shapes_dataset_builder.Builder, shapes_dataset_builder.config(world)
    monkeypatch.setattr(of, "BUILDER_CONFIGS", [small])
    of(data_dir=tmp_path, config="simple", file_format="array_record").download_and_prepare()
    network = random_network(tmp_path / "features.safetensors")
    out = tmp_path / "families.json"
    flagged(features=f"shapes:{network}", data_dir=tmp_path, seconds=1, n=70, only="VAE", out=out)
    families.main(families.prepare())
    rows = {row["family"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == ["real", "VAE"]
    row = rows["VAE"]
    assert row["steps"] >= 4
    assert row["seconds"] >= 1
    assert row["train_images_per_second"] > 0
    assert row["sample_images_per_second"] > 0
    assert row["fid"] > rows["real"]["fid"]
    assert "| VAE |" in capsys.readouterr().out
    sheet = media.read_png(out.with_suffix(".png"))
    assert len(np.unique(sheet.reshape(-1, 3), axis=0)) > 10
