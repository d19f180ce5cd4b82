"""From the shapes of a file to the networks: what is recognised builds those that the file is of."""

import jax
import jax.numpy as jnp
import pytest
import yaml

from ldm_jax.models import autoencoder, unet
from ldm_jax.weights import autoencoder as their_autoencoder
from ldm_jax.weights import clip as their_clip
from ldm_jax.weights import original
from ldm_jax.weights import unet as their_unet
from ldm_jax.weights import vq as their_vq
from ldm_jax.weights.original_yaml import from_yaml
from ldm_jax.weights.recognise import recognise
from tests import test_original, test_original_yaml
from tests.test_original import KEY, NETWORKS, their_shapes


def structure(network):
    levels = range(len(network.mults))
    depths = tuple(network.attention) or (0,) * len(network.mults)
    return dict(
        widths=[network.width * m for m in network.mults],
        depths=(*depths, network.middle),
        heads=[network._heads(i) for i in levels if depths[i]],
        **{
            name: getattr(network, name)
            for name in ("blocks", "transformer", "projection", "vector", "out_channels", "groups")
        },
    )


@pytest.mark.parametrize("family", test_original.FILES)
def test_the_configs_of_a_file_build_its_networks(family):
    found = recognise(test_original.FILES[family]())
    kind = {"xl": "xl", "refiner": "refiner", "unconditional": "celebahq"}
    settings, channels, _ = NETWORKS[kind.get(family.split("-")[-1], "sd1")]
    expected = unet.UNet(**settings, out_channels=channels)
    if "-2" in family:
        expected = expected.clone(projection="linear", heads=None, head_dim=64)
    network = their_unet.from_config(found.configs["unet"])
    assert structure(network) == structure(expected)
    if "vae" in found.configs:
        model = their_autoencoder.from_config(found.configs["vae"])
        assert model == autoencoder.KLAutoencoder()
    towers = {
        (768, False): test_original.CLIP_L,
        (1024, False): test_original.CLIP_H,
        (1280, True): test_original.CLIP_G,
    }
    for name, config in found.configs.items():
        if "architectures" in config:
            tower = their_clip.text_from_config(config)
            expected = towers[tower.width, name == "text_encoder_2"]
            assert tower.clone(eos=expected.eos) == expected


UPSCALER = dict(
    in_channels=7,
    out_channels=4,
    block_out_channels=(256, 512, 512, 1024),
    layers_per_block=2,
    down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * 3),
    up_block_types=(*("CrossAttnUpBlock2D",) * 3, "UpBlock2D"),
    attention_head_dim=8,
    cross_attention_dim=1024,
    num_class_embeds=1000,
    only_cross_attention=(True, True, True, False),
    use_linear_projection=True,
)


def test_the_upscaler_by_its_published_config():
    network = their_unet.from_config(UPSCALER)
    shapes = jax.eval_shape(network.init, KEY, *their_unet.example(UPSCALER))["params"]
    tensors = their_shapes(original.unet(network), shapes)
    assert tensors["model.diffusion_model.label_emb.weight"].shape == (1000, 1024)
    found = recognise(tensors)
    assert found.family == "stable-diffusion-2-upscaler"
    assert their_unet.from_config(found.configs["unet"]) == network
    assert found.configs["scheduler"]["prediction_type"] == "v_prediction"


def test_a_vq_autoencoder():
    model = their_vq.from_config(
        dict(block_out_channels=(32, 64), layers_per_block=1, num_vq_embeddings=11)
        | dict.fromkeys(("down_block_types",), ("DownEncoderBlock2D",) * 2)
        | dict.fromkeys(("up_block_types",), ("UpDecoderBlock2D",) * 2)
    )
    shapes = jax.eval_shape(model.init, KEY, jnp.zeros((1, 8, 8, 3)))["params"]
    tensors = their_shapes(original.autoencoder(model, ""), shapes)
    assert tensors["quantize.embedding.weight"].shape == (11, 3)
    assert their_vq.from_config(recognise(tensors).configs["vae"]) == model


@pytest.mark.parametrize("content", ["V1", "V2", "XL", "TXT2IMG", "CELEBAHQ"])
def test_what_a_yaml_file_says_can_be_built(content, tmp_path):
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(getattr(test_original_yaml, content)))
    found = from_yaml(tmp_path / "a.yaml")
    family = {
        "V1": "stable-diffusion-1",
        "V2": "stable-diffusion-2",
        "XL": "stable-diffusion-xl",
        "TXT2IMG": "ldm-text",
        "CELEBAHQ": "ldm-unconditional",
    }[content]
    recognised = recognise(test_original.FILES[family]()).configs
    assert their_unet.from_config(found["unet"]) == their_unet.from_config(recognised["unet"])
    quantizes = found["vae"]["_class_name"] == "VQModel"
    (their_vq if quantizes else their_autoencoder).from_config(found["vae"])
    assert found["scheduler"] == recognised["scheduler"]
