"""CLIP's encoders against transformers' with the same random weights."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ldm_jax import conditioners
from ldm_jax.models import clip
from ldm_jax.weights import clip as their
from ldm_jax.weights import files, table
from tests.drawn import drawn
from tests.parity import weights

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

VOCAB = 50
TEXT = dict(
    vocab_size=VOCAB,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=4,
    num_attention_heads=3,
    max_position_embeddings=11,
    projection_dim=10,
    layer_norm_eps=1e-4,
    bos_token_id=0,
    pad_token_id=1,
)
VISION = dict(
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=3,
    image_size=12,
    patch_size=4,
    projection_dim=10,
)
# The largest id, 49, is not the end where `eos_token_id` is 48; the second text ends twice, as padding may be the end.
IDS = np.array([[3, 5, 49, 7, 48, 1, 1, 1, 1, 1, 1], [3, 48, 48, 5, 48, 9, 8, 2, 6, 49, 4]])


def text_model(projected, act="quick_gelu", eos=48):
    config = transformers.CLIPTextConfig(**TEXT, hidden_act=act, eos_token_id=eos)
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return weights.randomised(kind(config))


def vision_model(projected, act="gelu"):
    config = transformers.CLIPVisionConfig(**VISION, hidden_act=act)
    kind = transformers.CLIPVisionModelWithProjection if projected else transformers.CLIPVisionModel
    return weights.randomised(kind(config))


def read(theirs, folder, from_config, rows, x):
    """Our module and parameters from what transformers writes."""
    theirs.save_pretrained(folder)
    module = from_config(json.loads((folder / "config.json").read_text()))
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    tensors = files.read(folder / "model.safetensors")
    return module, table.load(rows(tensors), shapes, tensors)


def close(ours, theirs):
    theirs = theirs.detach().numpy()
    assert ours.shape == theirs.shape
    assert np.linalg.norm(ours - theirs) < 1e-5 * np.linalg.norm(theirs)


@pytest.mark.parametrize("eos", [2, 48])
@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("projected", [False, True])
def test_states_and_pooled_text(projected, act, eos, tmp_path):
    theirs = text_model(projected, act, eos)
    module, params = read(theirs, tmp_path, their.text_from_config, their.text_table, IDS)
    with torch.no_grad():
        reference = theirs(torch.from_numpy(IDS), output_hidden_states=True)
        inner = theirs.text_model if projected else theirs
        states = reference.hidden_states
        normed = inner.final_layer_norm(states[-2])
    run = jax.jit(module.apply, static_argnames=("skip", "norm"))
    last = run({"params": params}, IDS)
    close(last.tokens, reference.last_hidden_state)
    pooled = reference.text_embeds if projected else reference.pooler_output
    close(last.pooled, pooled)
    before = run({"params": params}, IDS, skip=1, norm=False)  # SDXL
    close(before.tokens, states[-2])
    close(before.pooled, pooled)
    close(run({"params": params}, IDS, skip=1).tokens, normed)  # clip_skip = 1 of diffusers
    close(run({"params": params}, IDS, skip=4, norm=False).tokens, states[0])
    close(run({"params": params}, IDS[:, :7]).tokens, reference.last_hidden_state[:, :7])


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("projected", [False, True])
def test_states_and_pooled_images(projected, act, tmp_path):
    theirs = vision_model(projected, act)
    x = np.random.default_rng(0).standard_normal((2, 12, 12, 3)).astype(np.float32)
    module, params = read(theirs, tmp_path, their.vision_from_config, their.vision_table, x)
    with torch.no_grad():
        reference = theirs(torch.from_numpy(x).permute(0, 3, 1, 2), output_hidden_states=True)
    run = jax.jit(module.apply, static_argnames="skip")
    ours = run({"params": params}, x)
    close(ours.tokens, reference.last_hidden_state)
    close(ours.pooled, reference.image_embeds if projected else reference.pooler_output)
    close(run({"params": params}, x, skip=1).tokens, reference.hidden_states[-2])


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("kind", ["text", "vision"])
def test_written_folders_are_read_by_transformers(kind, projected, tmp_path):
    if kind == "text":
        theirs, x = text_model(projected, eos=2), IDS
        module, params = read(theirs, tmp_path / "a", their.text_from_config, their.text_table, x)
        rows, config = their.text_table(), their.text_to_config(module)
    else:
        theirs, x = vision_model(projected), jnp.zeros((1, 12, 12, 3))
        module, params = read(
            theirs, tmp_path / "a", their.vision_from_config, their.vision_table, x
        )
        rows, config = their.vision_table(), their.vision_to_config(module)
    tensors = table.export(rows, params)
    assert all(name.startswith((kind, "visual")) for name in tensors)
    files.write(tmp_path / "b" / "model.safetensors", tensors)
    (tmp_path / "b" / "config.json").write_text(json.dumps(config))
    again, found = type(theirs).from_pretrained(tmp_path / "b", output_loading_info=True)
    assert not any(found.values()), found
    for key, value in theirs.state_dict().items():
        assert again.state_dict()[key].numpy().tobytes() == value.numpy().tobytes(), key
    for key in TEXT if kind == "text" else VISION:
        if key not in ("bos_token_id", "pad_token_id", *(() if projected else ["projection_dim"])):
            assert getattr(again.config, key) == getattr(theirs.config, key), key


def test_prepared_images_are_close_to_those_of_the_image_processor():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (5, 7, 3), np.uint8)
    image = np.asarray(Image.fromarray(noise).resize((100, 70), Image.Resampling.BILINEAR))
    size = {"shortest_edge": 24}, {"height": 24, "width": 24}
    processor = transformers.CLIPImageProcessorPil(size=size[0], crop_size=size[1])
    expected = processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    ours = clip.prepared(jnp.asarray(image[None] / 127.5 - 1, jnp.float32), 24)[0]
    assert np.abs(ours - expected).max() < 2 / 255 / min(clip.STD)


def test_a_pair_gives_what_diffusers_feeds_to_the_unet_of_xl():
    diffusers = pytest.importorskip("diffusers")
    network = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        cross_attention_dim=32,
        norm_num_groups=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=6 * 256 + 10,
    )
    fed = []
    network.add_embedding.register_forward_pre_hook(lambda _, given: fed.append(given[0]))
    encoders = [
        clip.TextEncoder(VOCAB, width, 3, 2, 16, act, length=11, projection=projection)
        for width, act, projection in ((12, "quick_gelu", None), (20, "gelu", 10))
    ]
    sizes = jnp.array([[1024, 1024, 0, 13, 512, 1024], [64, 200, 7, 0, 96, 128.0]])
    batch = {"tokens": IDS, "tokens_2": IDS[::-1], "sizes": sizes}
    module = conditioners.ClipPair(encoders, [IDS[0].tolist()] * 2)
    params = drawn(module, batch)
    cond = jax.jit(module.apply)(params, batch)
    pooled = (
        encoders[1].apply({"params": params["params"]["encoders_1"]}, jnp.array(IDS[::-1])).pooled
    )
    added = {
        "text_embeds": torch.from_numpy(np.array(pooled)),
        "time_ids": torch.from_numpy(np.array(sizes)),
    }
    tokens = torch.from_numpy(np.array(cond.tokens))
    with torch.no_grad():
        network(torch.zeros(2, 4, 8, 8), 3, tokens, added_cond_kwargs=added)
    assert len(fed) == 1
    np.testing.assert_allclose(
        cond.vector, fed[0].numpy(), atol=2e-4
    )  # cos of large float32 angles
