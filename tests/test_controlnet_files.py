"""ControlNets in folders of pipelines and in single files: recognised, loaded, written and read again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.pretrained import components, controlnets, from_pretrained, kinds, start
from ldm_jax.training import sharding
from ldm_jax.weights import controlnet, files, original, recognise_controlnet
from tests import pretrained_folder as reduced
from tests.published_unets import CONTROLNETS
from tests.test_original import their_shapes
from tests.tiny import assert_equal

SAID = {key: reduced.CONTROL[key] for key in ("attention_head_dim", "norm_num_groups")}


@pytest.mark.parametrize("kind", CONTROLNETS)
def test_the_published_ones_are_recognised_in_both_layouts(kind):
    """From shapes alone, with and without the prefix, comes the network of their config.json."""
    config = CONTROLNETS[kind][0]
    asked = {"global_pool_conditions": True} if kind == "shuffle" else {}
    made = components.make("ControlNetModel", config, jnp.float32)
    layouts = {
        original.CONTROL: original.controlnet(made.module),
        "": original.controlnet(made.module, ""),
        None: controlnet.table_of(config),
    }
    for prefix, rows in layouts.items():
        found = recognise_controlnet.recognise(their_shapes(rows, made.shapes), asked)
        assert found.prefix == prefix
        again = components.make("ControlNetModel", found.config, jnp.float32)
        assert again.module == made.module
        assert found.config["conditioning_channels"] == 3


def test_what_no_shapes_tell_is_asked_for():
    net = components.make("ControlNetModel", reduced.CONTROL, jnp.float32)
    tensors = their_shapes(original.controlnet(net.module), net.shapes)
    with pytest.raises(ValueError, match="do not tell how many heads"):
        recognise_controlnet.recognise(tensors)
    with pytest.raises(ValueError, match="no tensors of a ControlNet"):
        recognise_controlnet.recognise({"lora_unet": np.zeros(1)})
    found = recognise_controlnet.recognise(tensors, SAID | dict(global_pool_conditions=True))
    again = components.make("ControlNetModel", found.config, jnp.float32).module
    assert again == net.module.clone(pool=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and two ControlNets beside it: "0" and "1"."""
    root = tmp_path_factory.mktemp("steered")
    for i in range(2):
        reduced.component(root / str(i), "ControlNetModel", reduced.CONTROL, 7 + i)
    return reduced.write(root / "model")


def opened(path, *nets, **kwargs):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return from_pretrained(path, controlnets=nets, mesh=mesh, **kwargs)


def test_a_folder_keeps_its_controlnets(folder, tmp_path):
    nets = [folder.parent / str(i) for i in range(2)]
    both = opened(folder, *nets)
    both.save_pretrained(tmp_path / "both")
    again = opened(tmp_path / "both")
    assert_equal(again.params, both.params)
    assert again.index["_class_name"] == "StableDiffusionControlNetPipeline"
    assert again.index["controlnet"] == ["diffusers", "MultiControlNetModel"]
    opened(folder, nets[0]).save_pretrained(tmp_path / "one")
    # Those of the folder come first.
    assert_equal(opened(tmp_path / "one", nets[1]).params, both.params)
    assert not (tmp_path / "one" / "controlnet_1").exists()
    with pytest.raises(ValueError, match="ControlNets, which are not trained here"):
        start.from_folder(tmp_path / "one")
    with pytest.raises(ValueError, match="has a place for one ControlNet, and there are 2"):
        both.save_pretrained(tmp_path / "a.safetensors", layout="original")


def test_single_files(folder, tmp_path):
    """Of diffusers without its config, and the original layout within that of a whole model."""
    net = folder.parent / "0"
    pipe = opened(folder, net)
    theirs = net / "diffusion_pytorch_model.safetensors"
    assert_equal(opened(folder, (theirs, SAID)).params, pipe.params)
    whole = tmp_path / "whole.safetensors"
    pipe.save_pretrained(whole, layout="original")
    assert_equal(opened(folder, (whole, SAID)).params, pipe.params)
    heads = {"attention_head_dim": reduced.UNET["attention_head_dim"], "norm_num_groups": 8}
    config = {
        "unet": heads,
        "vae": {"norm_num_groups": 4, "scaling_factor": 0.18215},
        "text_encoder": reduced.TEXT,
        "scheduler": reduced.SCHEDULER | {"prediction_type": "epsilon"},
        "controlnet": SAID,
    }
    again = opened(whole, config=config, tokenizers=[folder / "tokenizer"])
    assert_equal(again.params, pipe.params)
    tensors = dict(files.read(whole))
    del tensors["control_model.zero_convs.0.0.weight"]
    stored = controlnets.of_tensors(tensors, SAID)
    made = components.make("ControlNetModel", stored.config, jnp.float32)
    with pytest.raises(ValueError, match=r"1 tensors are missing: 'control_model.zero_convs.0"):
        made.check(stored.tensors(made))


def test_classes_of_pipelines_with_controlnets():
    kinds_of = {
        "StableDiffusionPipeline": "StableDiffusionControlNetPipeline",
        "StableDiffusionXLPipeline": "StableDiffusionXLControlNetPipeline",
        "StableDiffusionXLImg2ImgPipeline": "StableDiffusionXLControlNetImg2ImgPipeline",
        "StableDiffusionControlNetPipeline": "StableDiffusionControlNetPipeline",
    }
    assert {kind: kinds.controlled(kind) for kind in kinds_of} == kinds_of
    with pytest.raises(ValueError, match="diffusers has no StableDiffusionUpscalePipeline with"):
        kinds.controlled("StableDiffusionUpscalePipeline")
