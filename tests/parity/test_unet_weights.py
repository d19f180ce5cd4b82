"""U-Nets by their configs: names and shapes of the published ones at full size, outputs and folders of small ones."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import tree
from ldm_jax.nn import embeddings
from ldm_jax.weights import files, table
from ldm_jax.weights import unet as their
from tests.parity import weights
from tests.published_unets import CELEBA, SD1, SD2, SDXL, UNCLIP, UNETS, UPSCALER

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.parity

T = np.array([3.0, 731.0], np.float32)


def of_config(config):
    """Diffusers' model without weights' values."""
    with torch.device("meta"):
        return getattr(diffusers, config["_class_name"]).from_config(config)


@pytest.mark.parametrize("name", UNETS)
def test_names_shapes_and_number_of_the_tensors_of_published_models(name):
    config, count, _ = UNETS[name]
    ours = their.from_config(config)
    shapes = jax.eval_shape(ours.init, jax.random.key(0), *their.example(config))["params"]
    rows = their.table_of(config)
    found = {
        table.their_name(rows, at): table.their_shape(at, leaf.shape)
        for at, leaf in zip(tree.names(shapes), jax.tree.leaves(shapes), strict=True)
    }
    theirs = {k: tuple(v.shape) for k, v in of_config(config).state_dict().items()}
    assert found == theirs
    assert sum(int(np.prod(s)) for s in theirs.values()) == count
    # And back: our config gives the same tensors and the same network.
    back = their.to_config(ours, shapes, their.embedding_of(config))
    again = of_config(back)
    assert {k: tuple(v.shape) for k, v in again.state_dict().items()} == theirs
    assert their.from_config(back) == ours


SMALL = dict(block_out_channels=[16, 32, 48], layers_per_block=1, norm_num_groups=8, sample_size=8)
DOWN = ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"]
UP = ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"]
CASES = {
    "Stable Diffusion 1": SD1
    | SMALL
    | dict(
        attention_head_dim=4,
        cross_attention_dim=10,
        down_block_types=["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    ),
    "Stable Diffusion 2, depth": SD2
    | SMALL
    | dict(
        in_channels=5,
        attention_head_dim=[2, 4, 6],
        cross_attention_dim=12,
        down_block_types=DOWN,
        up_block_types=UP,
    ),
    "unCLIP": UNCLIP
    | SMALL
    | dict(
        attention_head_dim=[2, 4, 6],
        cross_attention_dim=12,
        projection_class_embeddings_input_dim=14,
        down_block_types=DOWN,
        up_block_types=UP,
        resnet_time_scale_shift="scale_shift",
        norm_eps=1e-3,
    ),
    "SDXL": SDXL
    | SMALL
    | dict(
        attention_head_dim=[2, 4, 6],
        cross_attention_dim=12,
        # Of these, 2 * 256 are sinusoids of sizes.
        projection_class_embeddings_input_dim=512 + 7,
        transformer_layers_per_block=[1, 2, 3],
    ),
    "x4 upscaler": UPSCALER
    | SMALL
    | dict(
        attention_head_dim=4,
        cross_attention_dim=12,
        num_class_embeds=9,
        only_cross_attention=[True, True, False],
        down_block_types=DOWN,
        up_block_types=UP,
    ),
    "faces": CELEBA
    | SMALL
    | dict(
        attention_head_dim=8,
        down_block_types=["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
        up_block_types=["AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
        norm_eps=1e-3,
    ),
    "faces, by class": CELEBA
    | SMALL
    | dict(
        attention_head_dim=None,
        down_block_types=["AttnDownBlock2D"] * 3,
        up_block_types=["AttnUpBlock2D"] * 3,
        num_class_embeds=5,
        resnet_time_scale_shift="scale_shift",
        attn_norm_num_groups=8,
        downsample_type="resnet",
        upsample_type="resnet",
    ),
    "no attention": CELEBA
    | SMALL
    | dict(
        add_attention=False,
        down_block_types=["DownBlock2D"] * 3,
        up_block_types=["UpBlock2D"] * 3,
    ),
}


def asked(config, cond):
    """What diffusers' model is given for the same condition, and the vector that ours reads."""
    kwargs, vector = {}, cond.vector
    if cond.tokens is not None:
        kwargs["encoder_hidden_states"] = torch.from_numpy(cond.tokens)
    if config.get("num_class_embeds"):
        labels = np.array([1, config["num_class_embeds"] - 1])
        kwargs["class_labels"] = torch.from_numpy(labels)
        vector = np.eye(config["num_class_embeds"], dtype=np.float32)[labels]
    elif config.get("class_embed_type"):
        kwargs["class_labels"] = torch.from_numpy(vector)
    elif config.get("addition_embed_type"):
        sizes = torch.tensor([[512.0, 16.0], [1024.0, 0.0]])
        text = torch.from_numpy(vector[:, : vector.shape[1] - 512].copy())
        kwargs["added_cond_kwargs"] = dict(text_embeds=text, time_ids=sizes)
        waves = embeddings.sinusoid(jnp.asarray(sizes.numpy().ravel()), 256).reshape(2, -1)
        vector = np.concatenate([text.numpy(), waves], axis=-1)
    return kwargs, cond.replace(vector=vector)


@pytest.mark.parametrize("name", CASES)
def test_from_diffusers_and_back(name, tmp_path):
    torch.manual_seed(0)
    theirs = getattr(diffusers, CASES[name]["_class_name"]).from_config(CASES[name])
    weights.randomised(theirs).save_pretrained(tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    ours, rows = their.from_config(config), their.table_of(config)
    example = their.example(config, batch=2)
    shapes = jax.eval_shape(ours.init, jax.random.key(0), *example)["params"]
    read = files.read(tmp_path / "theirs" / "diffusion_pytorch_model.safetensors")
    params = table.load(rows, shapes, read)

    rng = np.random.default_rng(0)
    sizes = (their.channels(config).latent, their.channels(config).spatial)
    full = rng.standard_normal((2, 8, 12, sum(sizes))).astype(np.float32)
    _, _, cond = jax.tree.map(lambda s: rng.standard_normal(s.shape).astype(np.float32), example)
    kwargs, cond = asked(config, cond)
    cond = cond.replace(spatial=full[..., sizes[0] :] if sizes[1] else None)
    y = jax.jit(ours.apply)({"params": params}, full[..., : sizes[0]], T, cond)
    with torch.no_grad():
        reference = theirs(
            torch.from_numpy(full).permute(0, 3, 1, 2), torch.from_numpy(T), **kwargs
        ).sample
    error = weights.relative_error(y, reference)
    print(f"{name}: {error:.1e}")
    assert error < 1e-5

    folder = tmp_path / "ours"
    files.write(folder / "diffusion_pytorch_model.safetensors", table.export(rows, params))
    back = their.to_config(ours, params, their.embedding_of(config))
    (folder / "config.json").write_text(json.dumps(back))
    again = type(theirs).from_pretrained(folder).eval()
    assert again.state_dict().keys() == theirs.state_dict().keys()
    for key, value in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    with torch.no_grad():
        repeated = again(
            torch.from_numpy(full).permute(0, 3, 1, 2), torch.from_numpy(T), **kwargs
        ).sample
    assert torch.equal(repeated, reference)
