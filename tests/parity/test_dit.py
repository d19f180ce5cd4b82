"""DiT against diffusers' `DiTTransformer2DModel`, and the learned variance against its DDPM scheduler."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.conditioners import Label
from ldm_jax.diffusion import learned, paths, samplers
from ldm_jax.diffusion.process import Point, posterior, transition
from ldm_jax.weights import dit as their
from ldm_jax.weights import files, table
from tests.parity import weights

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.parity

T = np.array([0.0, 731.0], np.float32)
SMALL = dict(num_attention_heads=3, attention_head_dim=8, num_layers=2, num_embeds_ada_norm=7)
CASES = {
    "with a variance": dict(in_channels=4, out_channels=8, sample_size=8),
    "without": dict(in_channels=3, out_channels=3, sample_size=12, patch_size=4),
}
# The authors' values, where diffusers has others.
AUTHORS = dict(norm_eps=1e-6)
XL = dict(out_channels=8, sample_size=32)


def as_the_authors(model):
    """Sinusoids with the frequencies of facebookresearch/DiT: diffusers divides by 127, they by 128."""
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return model


def with_one_embedding(model):
    """Every block has the embeddings of the first, as in all published files."""
    first = model.transformer_blocks[0].norm1.emb
    for block in model.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(first.state_dict())
    return model


def made(case):
    model = diffusers.DiTTransformer2DModel(**SMALL | AUTHORS | CASES[case])
    return as_the_authors(with_one_embedding(weights.randomised(model)))


def ours_on(network, classes, params, x, labels):
    def run(params, x):
        label = Label(classes, network.width, into="vector")
        cond = label.apply({"params": params["conditioner"]}, {"label": jnp.asarray(labels)})
        return network.apply({"params": params["network"]}, x, jnp.asarray(T), cond)

    return jax.jit(run)(params, x)


@pytest.mark.parametrize("case", CASES)
def test_from_diffusers_and_back(case, tmp_path):
    model = made(case)
    model.save_pretrained(tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    tensors = files.read(tmp_path / "theirs" / "diffusion_pytorch_model.safetensors")
    network, classes = their.from_config(config)
    side, channels = config["sample_size"], config["in_channels"]
    shapes = their.shapes(network, classes, channels)
    params = table.load(their.DIFFUSERS, shapes, their.shared(tensors))

    x = np.random.default_rng(0).standard_normal((2, side, side, channels)).astype(np.float32)
    labels = np.array([3, 7])  # the last is the null class
    y = ours_on(network, classes, params, x, labels)
    with torch.no_grad():
        reference = model(
            torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(T), torch.from_numpy(labels)
        ).sample
    assert weights.relative_error(y, reference) < 1e-5

    ours = tmp_path / "ours"
    back = their.spread(table.export(their.DIFFUSERS, params), network.depth)
    files.write(ours / "diffusion_pytorch_model.safetensors", back)
    (ours / "config.json").write_text(json.dumps(their.to_config(network, classes, channels, side)))
    again, trouble = diffusers.DiTTransformer2DModel.from_pretrained(ours, output_loading_info=True)
    assert not any(trouble.values())
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_names_and_shapes_of_xl_2():
    with torch.device("meta"):
        model = diffusers.DiTTransformer2DModel(**XL)
    network, classes = their.from_config(dict(model.config))
    shapes = their.shapes(network, classes, 4)
    tensors = {
        name: np.broadcast_to(np.float32(0), t.shape) for name, t in model.state_dict().items()
    }
    table.check(their.DIFFUSERS, shapes, their.shared(tensors))
    assert (
        sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))
        == 675_129_632 - 256 * 1152
    )


@pytest.mark.parametrize("steps", [1000, 250])
def test_the_learned_variance_is_the_scheduler_s(steps):
    scheduler = diffusers.DDPMScheduler(
        beta_schedule="linear", variance_type="learned_range", timestep_spacing="linspace"
    )
    scheduler.set_timesteps(steps)
    points = samplers.grid(paths.ddpm("linear", 1e-4, 0.02), steps, "linspace")
    rng = np.random.default_rng(0)
    for i in (0, steps // 2, steps - 2):
        p, q = (Point(*(a[j] for a in points)) for j in (i, i + 1))
        t = int(scheduler.timesteps[i])
        assert t == round(float(p.t) * 999)
        s = rng.uniform(-1.2, 1.2, (3, 2)).astype(np.float32)
        ours = learned.variance(jnp.asarray(s), posterior(p, q)[2], transition(p, q)[1])
        logs = scheduler._get_variance(t, predicted_variance=torch.from_numpy(s))
        np.testing.assert_allclose(np.log(ours), logs.numpy(), atol=2e-3)
