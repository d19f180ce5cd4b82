"""The tiny autoencoder against diffusers' `AutoencoderTiny`: outputs in its ranges, names, folders."""

import json

import jax
import numpy as np
import pytest

from ldm_jax.models import tiny_autoencoder
from ldm_jax.weights import files, table
from ldm_jax.weights import tiny_autoencoder as their
from tests.parity import weights
from tests.test_tiny_autoencoder import TAESD, shapes_of

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.parity

FORMS = {
    "published, narrow": TAESD
    | dict(encoder_block_out_channels=[12] * 4, decoder_block_out_channels=[12] * 4),
    "uneven": TAESD
    | dict(
        encoder_block_out_channels=[20] * 3,
        decoder_block_out_channels=[20] * 3,
        num_encoder_blocks=[2, 0, 1],
        num_decoder_blocks=[0, 2, 3],
        latent_channels=16,
    ),
}


def rows_of(model):
    return their.table(model.encoder_blocks, model.decoder_blocks)


def test_the_published_model_has_the_names_and_shapes_of_diffusers():
    with torch.device("meta"):
        theirs = diffusers.AutoencoderTiny.from_config(TAESD)
    model = their.from_config(TAESD)
    ours = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes_of(model)):
        at = "/".join(k.key for k in path)
        place = table.find(rows_of(model), at)
        ours[place.name] = table.their_shape(at, leaf.shape, place.layout)
    assert ours == {name: tuple(t.shape) for name, t in theirs.state_dict().items()}


@pytest.mark.parametrize("form", FORMS)
def test_from_diffusers_and_back(form, tmp_path):
    theirs = weights.randomised(diffusers.AutoencoderTiny.from_config(FORMS[form]))
    theirs.save_pretrained(tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    tensors = files.read(tmp_path / "theirs" / "diffusion_pytorch_model.safetensors")
    model = their.from_config(config)
    params = table.load(rows_of(model), shapes_of(model), tensors)
    x = np.random.default_rng(0).uniform(-1, 1, (2, 16, 24, 3)).astype(np.float32)

    @jax.jit
    def run(params, x, z):
        def call(method, *args):
            return model.apply({"params": params}, *args, method=method)

        stored = tiny_autoencoder.scale_latents(z)
        read = tiny_autoencoder.unscale_latents(jax.numpy.round(stored * 255) / 255)
        return call("encode", x), call("decode", z), stored, call("decode", read)

    with torch.no_grad():
        x_torch = torch.from_numpy(x).permute(0, 3, 1, 2)
        reference = theirs.encode(x_torch).latents
        z = np.moveaxis(reference.numpy(), 1, -1)
        latents, y, stored, bytewise = run(params, x, z)
        errors = [
            weights.relative_error(latents, reference),
            weights.relative_error(y, theirs.decode(reference).sample),
            weights.relative_error(stored, theirs.scale_latents(reference)),
            weights.relative_error(bytewise, theirs(x_torch).sample),
        ]
    assert max(errors) < 1e-5
    assert np.std(latents, axis=(1, 2)).min() > 0.1  # no row of dead ReLUs
    assert np.abs(y).max() > 1  # neither of us clips

    ours = tmp_path / "ours"
    files.write(ours / "diffusion_pytorch_model.safetensors", table.export(rows_of(model), params))
    (ours / "config.json").write_text(json.dumps(their.to_config(model)))
    again, trouble = diffusers.AutoencoderTiny.from_pretrained(ours, output_loading_info=True)
    assert not any(trouble.values())
    for key, value in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key

    def told(config):
        return {k: v for k, v in config.items() if k[0] != "_" and k != "block_out_channels"}

    assert told(again.config) == told(theirs.config)
