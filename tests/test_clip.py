import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import tree
from ldm_jax.models import clip
from ldm_jax.nn import attention
from ldm_jax.weights import clip as their
from ldm_jax.weights import table
from tests.drawn import count, drawn, like

KEY = jax.random.key(0)
IDS = jnp.array([[3, 5, 2, 9, 0, 0], [3, 1, 4, 1, 9, 9]])
IMAGES = jax.random.normal(KEY, (2, 8, 8, 3))

# As published beside the weights.
SHARED = dict(
    attention_dropout=0.0,
    dropout=0.0,
    initializer_factor=1.0,
    initializer_range=0.02,
    layer_norm_eps=1e-05,
    torch_dtype="float16",
    transformers_version="4.25.0.dev0",
)
SHARED_TEXT = SHARED | dict(
    bos_token_id=0,
    eos_token_id=2,
    pad_token_id=1,
    max_position_embeddings=77,
    model_type="clip_text_model",
    vocab_size=49408,
)
SHARED_VISION = SHARED | dict(model_type="clip_vision_model", image_size=224, num_channels=3)


def sizes(hidden, intermediate, layers, heads, act, projection):
    return dict(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_act=act,
        projection_dim=projection,
    )


TEXTS = {
    "sd1": (
        sizes(768, 3072, 12, 12, "quick_gelu", 768) | dict(architectures=["CLIPTextModel"]),
        123_060_480,
    ),
    "sd2": (
        sizes(1024, 4096, 23, 16, "gelu", 512) | dict(architectures=["CLIPTextModel"]),
        340_387_840,
    ),
    "sdxl 2": (
        sizes(1280, 5120, 32, 20, "gelu", 1280)
        | dict(architectures=["CLIPTextModelWithProjection"]),
        694_659_840,
    ),
}
VISIONS = {
    "ViT-L/14": (
        sizes(1024, 4096, 24, 16, "quick_gelu", 768)
        | dict(architectures=["CLIPVisionModelWithProjection"], patch_size=14),
        303_966_208,
    ),
    "ViT-H/14": (
        sizes(1280, 5120, 32, 16, "gelu", 1024)
        | dict(architectures=["CLIPVisionModelWithProjection"], patch_size=14),
        632_076_800,
    ),
}


def text_encoder(**settings):
    defaults = dict(vocab=10, width=12, layers=3, heads=2, hidden=20, length=6)
    return clip.TextEncoder(**defaults | settings)


def vision_encoder(**settings):
    defaults = dict(size=8, patch=4, width=12, layers=2, heads=2, hidden=20)
    return clip.VisionEncoder(**defaults | settings)


def shapes(module, x, **kwargs):
    return jax.eval_shape(lambda: module.init(KEY, x, **kwargs))["params"]


@pytest.mark.parametrize("name", TEXTS)
def test_published_text_encoders(name):
    config, parameters = TEXTS[name]
    module = their.text_from_config(SHARED_TEXT | config, jnp.bfloat16)
    assert (module.dtype, module.eos, module.activation) == (
        jnp.bfloat16,
        None,
        config["hidden_act"],
    )
    found = shapes(module, jnp.zeros((1, 77), int))
    assert count(found) == parameters
    names = {table.their_name(their.text_table(), leaf) for leaf in tree.names(found)}
    assert len(names) == len(tree.names(found))
    assert "text_model.embeddings.position_embedding.weight" in names
    assert f"text_model.encoder.layers.{module.layers - 1}.self_attn.out_proj.bias" in names
    assert ("text_projection.weight" in names) == (name == "sdxl 2")
    assert their.text_from_config(their.text_to_config(module), jnp.bfloat16) == module


@pytest.mark.parametrize("name", VISIONS)
def test_published_vision_encoders(name):
    config, parameters = VISIONS[name]
    module = their.vision_from_config(SHARED_VISION | config)
    found = shapes(module, jnp.zeros((1, 224, 224, 3)))
    assert count(found) == parameters
    assert found["position"].shape[0] == 257
    names = {table.their_name(their.vision_table(), leaf) for leaf in tree.names(found)}
    assert len(names) == len(tree.names(found))
    assert {"vision_model.embeddings.class_embedding", "visual_projection.weight"} <= names
    assert their.vision_from_config(their.vision_to_config(module)) == module


@pytest.mark.parametrize("projection", [None, 5])
def test_all_layers_exist_whatever_is_left_out(projection):
    module = text_encoder(projection=projection)
    whole = shapes(module, IDS)
    for skip, norm in ((1, False), (3, False), (2, True)):
        assert shapes(module, IDS, skip=skip, norm=norm) == whole
    assert ("projection" in whole) == (projection is not None)


def test_a_token_changes_later_states_only():
    module = text_encoder()
    params = drawn(module, IDS)
    run = jax.jit(module.apply)
    before, after = (run(params, ids).tokens for ids in (IDS, IDS.at[0, 3].set(7)))
    np.testing.assert_array_equal(before[0, :3], after[0, :3])
    np.testing.assert_array_equal(before[1], after[1])
    assert np.abs(before[0, 3:] - after[0, 3:]).max(axis=-1).min() > 1e-3


def test_where_the_text_ends():
    params = drawn(text_encoder(), IDS)
    for eos, ends in ((None, (3, 4)), (9, (3, 4)), (1, (0, 1)), (0, (4, 0))):
        tokens, pooled = jax.jit(text_encoder(eos=eos).apply)(params, IDS)
        for row, end in enumerate(ends):
            np.testing.assert_array_equal(pooled[row], tokens[row, end])


def test_causal_attention_is_attention_to_each_prefix():
    q, k, v = jax.random.normal(KEY, (3, 2, 5, 3, 4))
    mask = jnp.array([[True, False, True, True, True], [True] * 5])
    for given in (None, mask):
        whole = attention.attend(q, k, v, given, causal=True)
        for i in (1, 3, 5):
            part = None if given is None else given[:, :i]
            prefix = attention.attend(q[:, i - 1 : i], k[:, :i], v[:, :i], part)
            np.testing.assert_allclose(whole[:, i - 1], prefix[:, 0], atol=1e-6)


def test_activations():
    x = jnp.ones((1, 6), int)
    outputs = {}
    for activation in ("quick_gelu", "gelu"):
        module = text_encoder(layers=1, activation=activation)
        params = drawn(module, x)
        outputs[activation] = module.apply(params, x).tokens
    difference = np.abs(outputs["gelu"] - outputs["quick_gelu"]).max()
    assert 1e-5 < difference < 0.1


@pytest.mark.parametrize("remat", [False, True])
def test_parameters_stay_float32_and_remat_keeps_names(remat):
    for module, x in ((text_encoder, IDS), (vision_encoder, IMAGES)):
        ours = module(dtype=jnp.bfloat16, remat=remat)
        params = drawn(ours, x)
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
        assert tree.names(params["params"]) == tree.names(shapes(module(), x))
        assert {y.dtype for y in jax.tree.leaves(ours.apply(params, x))} == {
            jnp.dtype(jnp.bfloat16)
        }


def test_a_patch_is_a_token_in_reading_order():
    module = vision_encoder(layers=0, projection=None)
    params = drawn(module, IMAGES)
    run = jax.jit(module.apply)
    before, after = (run(params, x).tokens for x in (IMAGES, IMAGES.at[:, 1, 6].add(1.0)))
    changed = np.abs(before - after).max(axis=(0, 2)) > 1e-6
    np.testing.assert_array_equal(changed, [False, False, True, False, False])  # class, then 2x2


# ---- images and weights --------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(40, 40), (40, 90), (31, 24), (10, 12)])
def test_prepared_images_are_the_middle_square(height, width):
    # A constant image stays one; a slope along the longer axis stays a slope that is centred.
    mean, std = np.array(clip.MEAN), np.array(clip.STD)
    grey = clip.prepared(jnp.full((1, height, width, 3), 0.2), 16)
    np.testing.assert_allclose(grey, np.broadcast_to((0.6 - mean) / std, grey.shape), atol=1e-5)
    ramp = (np.arange(width) + 0.5) / width - 0.5
    x = jnp.asarray(np.broadcast_to(ramp[:, None], (1, height, width, 3)), jnp.float32)
    y = np.asarray(clip.prepared(x, 16)[0, 8]) * std + mean - 0.5
    inner = y[4:-4, 0]
    np.testing.assert_allclose(inner, -inner[::-1], atol=0.5 / 16)
    long = max(16, 16 * width // min(height, width))
    np.testing.assert_allclose(np.diff(inner), 0.5 / long, rtol=0.05)


def test_weights_scale_tokens_and_keep_the_mean():
    tokens = 0.3 + jax.random.normal(KEY, (2, 4, 5))
    weights = jnp.array([[1, 1, 1, 1], [1.0, 2.0, 0.5, 1.0]])
    y = clip.weigh(tokens, weights)
    np.testing.assert_array_equal(y[0], tokens[0])
    np.testing.assert_allclose(y[1].mean(), tokens[1].mean(), rtol=1e-5)
    ratio = np.asarray(y[1] / tokens[1])
    np.testing.assert_allclose(ratio[1] / ratio[0], np.full(5, 2.0), rtol=1e-4)
    np.testing.assert_allclose(ratio[2] / ratio[3], np.full(5, 0.5), rtol=1e-4)
    nothing = clip.weigh(jnp.zeros((1, 4, 5)), weights[1:])
    np.testing.assert_array_equal(nothing, 0)


# ---- names ---------------------------------------------------------------------------------------


def test_both_sets_of_names_are_read_and_position_ids_are_ignored_on_request():
    params = like(shapes(text_encoder(), IDS))
    named = table.export(their.text_table(), params)
    bare = {name.removeprefix("text_model."): tensor for name, tensor in named.items()}
    assert bare.keys() != named.keys()
    target = jax.eval_shape(lambda: params)
    for tensors, prefix in ((named, "text_model."), (bare, "")):
        old = tensors | {f"{prefix}embeddings.position_ids": np.arange(6)[None]}
        again = table.load(their.text_table(old), target, old, ignore=their.IGNORED)
        jax.tree.map(np.testing.assert_array_equal, again, params)
        with pytest.raises(table.Mismatch, match=r"1 tensors are not used.*position_ids"):
            table.load(their.text_table(old), target, old)
        # A pattern covers whole names, and nothing that is needed.
        with pytest.raises(table.Mismatch, match=r"not used.*position_ids"):
            table.load(their.text_table(old), target, old, ignore=("position_ids",))
        table.load(their.text_table(old), target, old, ignore=(".*",))

    params = like(shapes(vision_encoder(), IMAGES))
    named = table.export(their.vision_table(), params)
    bare = {name.removeprefix("vision_model."): tensor for name, tensor in named.items()}
    for tensors in (named, bare):
        again = table.load(their.vision_table(tensors), jax.eval_shape(lambda: params), tensors)
        jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.parametrize("module", [text_encoder(eos=7, projection=3), vision_encoder()])
def test_configs_are_json_and_back(module):
    to, back = (
        (their.text_to_config, their.text_from_config)
        if isinstance(module, clip.TextEncoder)
        else (their.vision_to_config, their.vision_from_config)
    )
    assert back(json.loads(json.dumps(to(module)))) == module


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(architectures=["CLIPModel"]), "CLIPModel"),
        (dict(architectures=None), "must name 'CLIPTextModel'"),
        (dict(hidden_act="silu"), "'silu'"),
        (dict(attention_dropout=0.1), "attention_dropout = 0.1"),
        (dict(eos_token_id=[2, 3]), r"eos_token_id=\(2, 3\)"),
        (dict(use_attention_mask=True), "use_attention_mask = True"),
    ],
)
def test_configs_that_we_cannot_follow_are_told(change, message):
    with pytest.raises(ValueError, match=message):
        their.text_from_config(SHARED_TEXT | TEXTS["sd1"][0] | change)


def test_vision_configs_that_we_cannot_follow_are_told():
    config = SHARED_VISION | VISIONS["ViT-H/14"][0]
    with pytest.raises(ValueError, match=r"image_size=\(224, 112\)"):
        their.vision_from_config(config | dict(image_size=[224, 112]))
    with pytest.raises(ValueError, match="num_channels = 4"):
        their.vision_from_config(config | dict(num_channels=4))
    with pytest.raises(ValueError, match="eos=2"):
        their.text_to_config(text_encoder(eos=2))


@pytest.mark.parametrize(
    ("module", "x", "kwargs", "message"),
    [
        (text_encoder(), jnp.zeros((1, 7), int), {}, "6 positions and got 7 tokens"),
        (text_encoder(), IDS, {"skip": 4}, "skip=4"),
        (text_encoder(), IDS, {"skip": -1}, "skip=-1"),
        (text_encoder(heads=5), IDS, {}, "5 heads do not divide 12"),
        (vision_encoder(), jnp.zeros((1, 8, 12, 3)), {}, "8x8 and got 8x12"),
        (vision_encoder(), IMAGES, {"skip": 3}, "skip=3"),
    ],
)
def test_bad_input_is_named(module, x, kwargs, message):
    with pytest.raises(ValueError, match=message):
        shapes(module, x, **kwargs)
