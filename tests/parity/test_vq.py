"""The VQ autoencoder against diffusers' `VQModel`: codes, loss, gradients, outputs, folders."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models import vq
from ldm_jax.weights import files, table
from ldm_jax.weights import vq as their
from tests.parity import weights
from tests.test_vq import MODELS, published, shapes_of

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.parity

REDUCED = dict(norm_num_groups=4)
FORMS = {
    "plain": published((12, 20, 28), 3, 70) | REDUCED | dict(layers_per_block=1),
    "attention": published((8, 16), 4, 33, True) | REDUCED | dict(scaling_factor=1.0),
    "no attention": published((12, 20), 6, 40, middle=False)
    | REDUCED
    | dict(vq_embed_dim=5, layers_per_block=1),
    "no vq_embed_dim": published((12, 20), 5, 40) | REDUCED | dict(vq_embed_dim=None),
}


def channels_first(x):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


@pytest.mark.parametrize("name", MODELS)
def test_published_models_have_the_names_and_shapes_of_diffusers(name):
    config = MODELS[name][0]
    with torch.device("meta"):
        theirs = diffusers.VQModel.from_config(config)
    rows, ours = their.table(), {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes_of(their.from_config(config))):
        at = "/".join(k.key for k in path)
        place = table.find(rows, at)
        ours[place.name] = table.their_shape(at, leaf.shape, place.layout)
    assert ours == {name: tuple(t.shape) for name, t in theirs.state_dict().items()}


@pytest.mark.parametrize(("codes", "embed"), [(8192, 3), (16384, 4), (256, 4), (16384, 8)])
def test_codes_loss_and_gradients_equal_those_of_torch(codes, embed):
    from diffusers.models.autoencoders.vae import VectorQuantizer

    rng = np.random.default_rng(0)
    z = rng.standard_normal((2, 16, 24, embed)).astype(np.float32)
    theirs = VectorQuantizer(codes, embed, beta=0.25)
    torch.nn.init.normal_(theirs.embedding.weight)
    pull = rng.standard_normal(z.shape).astype(np.float32)
    z_torch = channels_first(z).requires_grad_()
    entries, loss, (_, _, indices) = theirs(z_torch)
    (10 * loss + (entries * channels_first(pull)).sum()).backward()

    model = vq.VQAutoencoder(embed=embed, codes=codes)
    codebook = jnp.asarray(theirs.embedding.weight.detach().numpy())

    @jax.jit
    def ours(codebook, z):
        def call(method, *args):
            return model.apply({"params": {"codebook": codebook}}, *args, method=method)

        found, indices = call("quantize", z)
        loss = vq.codebook_loss(z, call("lookup", indices))
        return 10 * loss + jnp.sum(found * pull), (found, indices, loss)

    (of_codebook, of_z), (found, numbers, value) = jax.jit(
        jax.grad(ours, argnums=(0, 1), has_aux=True)
    )(codebook, z)
    np.testing.assert_array_equal(np.ravel(numbers), indices.numpy())
    assert weights.relative_error(found, entries) < 1e-6
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
    assert weights.relative_error(of_z, z_torch.grad) < 1e-5
    np.testing.assert_allclose(of_codebook, theirs.embedding.weight.grad.numpy(), atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_from_diffusers_and_back(form, tmp_path):
    theirs = weights.randomised(diffusers.VQModel.from_config(FORMS[form]))
    with torch.no_grad():  # so that entries lie among the latents
        theirs.quantize.embedding.weight.normal_()
    theirs.save_pretrained(tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    tensors = files.read(tmp_path / "theirs" / "diffusion_pytorch_model.safetensors")
    model = their.from_config(config)
    params = table.load(their.table(tensors), shapes_of(model), tensors)
    x = np.random.default_rng(0).standard_normal((2, 16, 24, 3)).astype(np.float32)

    @jax.jit
    def run(params, x):
        def call(method, *args, **kwargs):
            return model.apply({"params": params}, *args, method=method, **kwargs)

        z = call("encode", x)
        return z, call("quantize", z)[1], call("decode", z), call("decode", z, quantized=True)

    z, indices, y, of_latents = run(params, x)
    with torch.no_grad():
        reference = theirs.encode(channels_first(x)).latents
        numbers = theirs.quantize(reference)[2][2]
        errors = [
            weights.relative_error(z, reference),
            weights.relative_error(y, theirs.decode(reference).sample),
            weights.relative_error(
                of_latents, theirs.decode(reference, force_not_quantize=True).sample
            ),
        ]
    assert max(errors) < 1e-5
    assert len(set(numbers.tolist())) > 5
    np.testing.assert_array_equal(np.ravel(indices), numbers.numpy())

    ours = tmp_path / "ours"
    files.write(ours / "diffusion_pytorch_model.safetensors", table.export(their.table(), params))
    back = their.to_config(model, config["scaling_factor"])
    (ours / "config.json").write_text(json.dumps(back))
    again, trouble = diffusers.VQModel.from_pretrained(ours, output_loading_info=True)
    assert not any(trouble.values())
    for key, value in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key

    def told(config):
        return {
            k: v
            for k, v in config.items()
            if k[0] != "_" and k not in ("sample_size", "vq_embed_dim")
        }

    assert told(again.config) == told(theirs.config)
