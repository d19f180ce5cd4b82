"""ControlNets against diffusers': names and shapes at full size, residuals, folders, and a U-Net that is steered."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import tree
from ldm_jax.diffusion import controls
from ldm_jax.nn import embeddings
from ldm_jax.types import Cond, Control
from ldm_jax.weights import controlnet as their
from ldm_jax.weights import files, table
from ldm_jax.weights import unet as their_unet
from tests.parity import weights
from tests.published_unets import CONTROLNET, CONTROLNETS, SD1

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.parity

T = np.array([3.0, 731.0], np.float32)


def of_config(config):
    with torch.device("meta"):
        return diffusers.ControlNetModel.from_config(config)


@pytest.mark.parametrize("name", CONTROLNETS)
def test_names_shapes_and_number_of_the_tensors_of_published_models(name):
    config, count = CONTROLNETS[name]
    ours, rows = their.from_config(config), their.table_of(config)
    shapes = jax.eval_shape(ours.init, jax.random.key(0), *their.example(config))["params"]
    found = {
        table.their_name(rows, at): table.their_shape(at, leaf.shape)
        for at, leaf in zip(tree.names(shapes), jax.tree.leaves(shapes), strict=True)
    }
    theirs = {k: tuple(v.shape) for k, v in of_config(config).state_dict().items()}
    assert found == theirs
    assert sum(int(np.prod(s)) for s in theirs.values()) == count
    back = their.to_config(ours, shapes, their_unet.embedding_of(config))
    assert {k: tuple(v.shape) for k, v in of_config(back).state_dict().items()} == theirs
    assert their.from_config(back) == ours


SMALL = dict(
    block_out_channels=[16, 32],
    layers_per_block=1,
    norm_num_groups=8,
    attention_head_dim=[2, 4],
    cross_attention_dim=12,
)
ONE = CONTROLNET | SMALL | dict(down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"])
ONE = ONE | dict(conditioning_embedding_out_channels=[4, 6, 8])
CASES = {
    "Stable Diffusion 1": ONE,
    "shuffle": ONE | dict(global_pool_conditions=True),
    "SDXL": CONTROLNETS["SDXL"][0]
    | SMALL
    | dict(
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
        transformer_layers_per_block=[1, 2],
        projection_class_embeddings_input_dim=512 + 7,
        conditioning_embedding_out_channels=[4, 6, 8],
        conditioning_channels=2,
    ),
}


def draw(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def first(x):
    return torch.from_numpy(np.moveaxis(x, -1, 1).copy())


def loaded(theirs, family, folder):
    """Ours with the weights and the config that theirs writes."""
    theirs.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    ours, rows = family.from_config(config), family.table_of(config)
    shapes = jax.eval_shape(ours.init, jax.random.key(0), *family.example(config))["params"]
    read = files.read(folder / "diffusion_pytorch_model.safetensors")
    return ours, table.load(rows, shapes, read), config


@pytest.mark.parametrize("name", CASES)
def test_from_diffusers_and_back(name, tmp_path):
    theirs = weights.randomised(diffusers.ControlNetModel.from_config(CASES[name]))
    ours, params, config = loaded(theirs, their, tmp_path / "theirs")
    x, tokens = draw((2, 8, 12, 4)), draw((2, 5, 12), 1)
    hint = draw((2, 32, 48, config["conditioning_channels"]), 2)
    cond, kwargs = Cond(tokens=tokens), {}
    if name == "SDXL":
        text, sizes = draw((2, 7), 3), np.array([[512, 16], [1024, 0]], np.float32)
        waves = embeddings.sinusoid(jnp.asarray(sizes.ravel()), 256).reshape(2, -1)
        cond = cond.replace(vector=np.concatenate([text, waves], axis=-1))
        kwargs["added_cond_kwargs"] = dict(
            text_embeds=torch.from_numpy(text), time_ids=torch.from_numpy(sizes)
        )
    found = jax.jit(ours.apply)({"params": params}, x, T, cond, hint)
    for guess_mode in (False, True):
        if guess_mode and not ours.pool:
            found = controls.guess(found)
        with torch.no_grad():
            skips, mid = theirs(
                first(x),
                torch.from_numpy(T),
                torch.from_numpy(tokens),
                first(hint),
                guess_mode=guess_mode,
                return_dict=False,
                **kwargs,
            )
        assert len(skips) == len(found.skips)
        errors = [
            weights.relative_error(a, b)
            for a, b in zip((*found.skips, found.mid), (*skips, mid), strict=True)
        ]
        print(f"{name}: {max(errors):.1e}")
        assert max(errors) < 1e-5

    ours_at = tmp_path / "ours"
    tensors = table.export(their.table_of(config), params)
    files.write(ours_at / "diffusion_pytorch_model.safetensors", tensors)
    back = their.to_config(ours, params, their_unet.embedding_of(config))
    (ours_at / "config.json").write_text(json.dumps(back))
    again = diffusers.ControlNetModel.from_pretrained(ours_at)
    assert again.state_dict().keys() == theirs.state_dict().keys()
    for key, value in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    for key in ("global_pool_conditions", "attention_head_dim", "addition_embed_type"):
        assert again.config[key] == theirs.config[key]


def test_a_unet_steered_by_two_controlnets(tmp_path):
    config = SD1 | SMALL | dict(down_block_types=ONE["down_block_types"])
    config["up_block_types"] = ["UpBlock2D", "CrossAttnUpBlock2D"]
    pair = [weights.randomised(diffusers.ControlNetModel.from_config(ONE), seed) for seed in (1, 2)]
    unet = weights.randomised(diffusers.UNet2DConditionModel.from_config(config))
    x, tokens = draw((2, 8, 12, 4)), draw((2, 5, 12), 1)
    hints = [draw((2, 32, 48, 3), seed) for seed in (2, 3)]
    with torch.no_grad():
        multi = diffusers.MultiControlNetModel(pair)
        skips, mid = multi(
            first(x),
            torch.from_numpy(T),
            torch.from_numpy(tokens),
            [first(h) for h in hints],
            [0.5, 1.5],
            return_dict=False,
        )
        reference = unet(
            first(x),
            torch.from_numpy(T),
            torch.from_numpy(tokens),
            down_block_additional_residuals=skips,
            mid_block_additional_residual=mid,
        ).sample

    ours, params, _ = loaded(unet, their_unet, tmp_path / "unet")
    nets = [loaded(c, their, tmp_path / f"control_{i}")[:2] for i, c in enumerate(pair)]

    def steer(net, params):
        return lambda *inputs: net.apply({"params": params}, *inputs)

    network = controls.with_controls(
        lambda *inputs: ours.apply({"params": params}, *inputs), *(steer(*net) for net in nets)
    )
    cond = Cond(
        tokens=tokens, controls=tuple(map(Control, hints, (0.5, np.array([1.5, 1.5], np.float32))))
    )
    y = jax.jit(network)(x, T, cond)
    error = weights.relative_error(y, reference)
    print(f"steered: {error:.1e}")
    assert error < 1e-5
