"""KL autoencoders from diffusers' folders and back: names, outputs, configs, and files with earlier names."""

import json

import jax
import numpy as np
import pytest

from ldm_jax.weights import autoencoder as their
from ldm_jax.weights import files, table
from tests.parity import weights
from tests.test_autoencoder_weights import MODELS, published, shapes_of

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.parity

REDUCED = dict(norm_num_groups=4, layers_per_block=1)
FORMS = {
    "three levels": published((12, 20, 28), 5, 0, **REDUCED, scaling_factor=0.3),
    "attention at the last levels": published((12, 20, 28), 3, 2, **REDUCED, force_upcast=False),
    "two blocks": published((8, 16), 4, 1, **REDUCED) | dict(layers_per_block=2),
    "bare": published(
        (12, 20),
        6,
        **REDUCED,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    ),
}


def described(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", MODELS)
def test_published_models_have_the_names_and_shapes_of_diffusers(name):
    config = MODELS[name][0]
    with torch.device("meta"):
        theirs = diffusers.AutoencoderKL.from_config(config)
    params = shapes_of(their.from_config(config))
    rows = their.table()

    def place(at, leaf):
        row = table.find(rows, at)
        return row.name, table.their_shape(at, leaf.shape, row.layout)

    leaves = jax.tree_util.tree_leaves_with_path(params)
    ours = dict(place("/".join(k.key for k in path), leaf) for path, leaf in leaves)
    assert ours == described(theirs.state_dict())


def compare(theirs, config, tensors):
    """The largest relative error of mean, log-variance and reconstruction."""
    model = their.from_config(config)
    params = {"params": table.load(their.table(tensors), shapes_of(model), tensors)}
    x = np.random.default_rng(0).standard_normal((2, 16, 24, 3)).astype(np.float32)

    @jax.jit
    def run(params, x):
        posterior = model.apply(params, x, method="encode")
        return posterior, model.apply(params, posterior.mean, method="decode")

    posterior, y = run(params, x)
    with torch.no_grad():
        reference = theirs.encode(torch.from_numpy(x).permute(0, 3, 1, 2)).latent_dist
        decoded = theirs.decode(reference.mean).sample
    errors = [
        weights.relative_error(posterior.mean, reference.mean),
        weights.relative_error(posterior.logvar, reference.logvar),
        weights.relative_error(y, decoded),
    ]
    return max(errors), model, params["params"]


@pytest.mark.parametrize("form", FORMS)
def test_from_diffusers_and_back(form, tmp_path):
    theirs = weights.randomised(diffusers.AutoencoderKL.from_config(FORMS[form]))
    theirs.save_pretrained(tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    tensors = files.read(tmp_path / "theirs" / "diffusion_pytorch_model.safetensors")
    error, model, params = compare(theirs, config, tensors)
    assert error < 1e-5

    ours = tmp_path / "ours"
    files.write(ours / "diffusion_pytorch_model.safetensors", table.export(their.table(), params))
    back = their.to_config(model, their.scaling_factor(config), config["force_upcast"])
    (ours / "config.json").write_text(json.dumps(back))
    again, trouble = diffusers.AutoencoderKL.from_pretrained(ours, output_loading_info=True)
    assert not any(trouble.values())
    for key, value in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key

    def told(config):
        return {k: v for k, v in config.items() if k[0] != "_" and k not in ("sample_size",)}

    assert told(again.config) == told(theirs.config)


def test_files_with_the_names_that_diffusers_once_gave(tmp_path):
    config = FORMS["attention at the last levels"]
    theirs = weights.randomised(diffusers.AutoencoderKL.from_config(config))
    before = {}
    for name, tensor in theirs.state_dict().items():
        for now, then in (
            ("to_q", "query"),
            ("to_k", "key"),
            ("to_v", "value"),
            ("to_out.0", "proj_attn"),
        ):
            name = name.replace(f".{now}.", f".{then}.")
        before[name] = tensor.clone()
    assert before.keys() != theirs.state_dict().keys()
    folder = tmp_path / "earlier"
    theirs.save_config(folder)
    path = folder / "diffusion_pytorch_model.safetensors"
    safetensors_torch.save_file(before, path, metadata={"format": "pt"})
    read = diffusers.AutoencoderKL.from_pretrained(folder).eval()  # they rename as well
    assert compare(read, config, files.read(path))[0] < 1e-5
