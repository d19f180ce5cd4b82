"""Single files in the layout of CompVis and Stability: tables, recognition, configs and the way back."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import tree
from ldm_jax.models import autoencoder, clip, text, unet
from ldm_jax.types import Cond
from ldm_jax.weights import files, original, original_configs, table
from ldm_jax.weights.recognise import recognise
from tests.drawn import like
from tests.tiny import assert_equal

KEY = jax.random.key(0)


def unet_shapes(network, channels=4, tokens=None):
    x = jax.ShapeDtypeStruct((1, 32, 32, channels), jnp.float32)
    cond = Cond(
        vector=jnp.zeros((1, network.vector)) if network.vector else None,
        tokens=jnp.zeros((1, 5, tokens)) if tokens else None,
    )
    return jax.eval_shape(network.init, KEY, x, jnp.zeros(1), cond)["params"]


def autoencoder_shapes(model):
    x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    return jax.eval_shape(model.init, KEY, x, KEY)["params"]


def text_shapes(model):
    return jax.eval_shape(model.init, KEY, jnp.zeros((1, 4), jnp.int32))["params"]


def their_shapes(rows, shapes):
    """What a file with these components has: names and shapes."""
    found = {}
    for name, leaf in zip(tree.names(shapes), jax.tree.leaves(shapes), strict=True):
        place = table.find(rows, name)
        assert place is not None, name
        shape = table.their_shape(name, leaf.shape, place.layout)
        assert found.setdefault(place.name, jax.ShapeDtypeStruct(shape, leaf.dtype)).shape == shape
    return found


XL = dict(head_dim=64, projection="linear")
NETWORKS = {
    "sd1": (dict(width=320, mults=(1, 2, 4, 4), attention=(1, 1, 1, 0), heads=8), 4, 768),
    "xl": (
        dict(width=320, mults=(1, 2, 4), attention=(0, 2, 10), middle=10, vector=2816, **XL),
        4,
        2048,
    ),
    "refiner": (
        dict(width=384, mults=(1, 2, 4, 4), attention=(0, 4, 4, 0), middle=4, vector=2560, **XL),
        4,
        1280,
    ),
    "celebahq": (
        dict(width=224, mults=(1, 2, 3, 4), attention=(0, 1, 1, 1), head_dim=32, transformer=False),
        3,
        None,
    ),
}
UNET_IN = "model.diffusion_model.input_blocks.0.0.weight"


@functools.cache
def _unet_file(kind):
    settings, channels, tokens = NETWORKS[kind]
    network = unet.UNet(**settings, out_channels=channels)
    return their_shapes(original.unet(network), unet_shapes(network, channels, tokens))


def unet_file(kind, reads=None, tokens=None, linear=False):
    """The names and shapes of a U-Net; those of Stable Diffusion 1 also with other tokens and projections."""
    found = dict(_unet_file(kind))
    shape = found[UNET_IN].shape
    found[UNET_IN] = jax.ShapeDtypeStruct((shape[0], reads or shape[1], *shape[2:]), jnp.float32)
    for name, leaf in found.items():
        if tokens and name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            found[name] = jax.ShapeDtypeStruct((leaf.shape[0], tokens), jnp.float32)
        if linear and name.endswith(("proj_in.weight", "proj_out.weight")):
            found[name] = jax.ShapeDtypeStruct(leaf.shape[:2], jnp.float32)
    return found


def sd2_file(reads=4):
    return unet_file("sd1", reads, tokens=1024, linear=True)


VAE = autoencoder.KLAutoencoder()
CLIP_L = clip.TextEncoder(vocab=49408, width=768, layers=12, heads=12, hidden=3072)
CLIP_H = clip.TextEncoder(
    vocab=49408, width=1024, layers=23, heads=16, hidden=4096, activation="gelu"
)
CLIP_G = clip.TextEncoder(
    vocab=49408,
    width=1280,
    layers=32,
    heads=20,
    hidden=5120,
    activation="gelu",
    projection=1280,
)
BERT = text.TextTransformer(vocab=30522, width=1280, layers=32)
XL_FIRST, XL_SECOND = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
XL_REFINER = "conditioner.embedders.0.model."


@functools.cache
def vae_file(prefix=original.VAE):
    return their_shapes(original.autoencoder(VAE, prefix), autoencoder_shapes(VAE))


@functools.cache
def clip_file(prefix="cond_stage_model.transformer."):
    return their_shapes(original.clip(prefix), text_shapes(CLIP_L))


@functools.cache
def clip_h_file():
    """The whole tower, with the last layer and the projection that Stable Diffusion 2 does not use."""
    prefix = "cond_stage_model.model."
    whole = clip.TextEncoder(
        vocab=49408, width=1024, layers=24, heads=16, hidden=4096, projection=1024
    )
    return their_shapes(original.open_clip(prefix), text_shapes(whole))


@functools.cache
def clip_g_file(prefix):
    return their_shapes(original.open_clip(prefix), text_shapes(CLIP_G))


FILES = {
    "stable-diffusion-1": lambda: unet_file("sd1") | vae_file() | clip_file(),
    "stable-diffusion-1-inpainting": lambda: unet_file("sd1", 9) | vae_file() | clip_file(),
    "stable-diffusion-1-instruct": lambda: unet_file("sd1", 8) | vae_file() | clip_file(),
    "stable-diffusion-2": lambda: sd2_file() | vae_file() | clip_h_file(),
    "stable-diffusion-2-inpainting": lambda: sd2_file(9) | vae_file() | clip_h_file(),
    "stable-diffusion-2-depth": lambda: sd2_file(5) | vae_file() | clip_h_file(),
    "stable-diffusion-xl": lambda: (
        unet_file("xl") | vae_file() | clip_file(XL_FIRST) | clip_g_file(XL_SECOND)
    ),
    "stable-diffusion-xl-refiner": lambda: (
        unet_file("refiner") | vae_file() | clip_g_file(XL_REFINER)
    ),
    "ldm-text": lambda: (
        unet_file("sd1", tokens=1280)
        | vae_file()
        | their_shapes(original.bert(BERT), text_shapes(BERT))
    ),
    "ldm-unconditional": lambda: unet_file("celebahq"),
}


def test_names_of_published_files():
    # Some of the names that the repositories' modules have, and how many: those of diffusers' models, of which q, k
    # and v are three where the files have one.
    names = unet_file("sd1").keys()
    assert len(names) == 686
    for name in (
        "time_embed.2.bias",
        "input_blocks.0.0.weight",
        "input_blocks.3.0.op.weight",
        "input_blocks.11.0.out_layers.3.weight",
        "middle_block.1.transformer_blocks.0.attn2.to_out.0.bias",
        "output_blocks.2.1.conv.weight",
        "output_blocks.5.2.conv.weight",
        "output_blocks.8.2.conv.weight",
        "output_blocks.11.0.skip_connection.weight",
        "output_blocks.11.1.transformer_blocks.0.norm1.bias",
        "out.2.weight",
    ):
        assert f"model.diffusion_model.{name}" in names
    xl = unet_file("xl")
    assert len(xl) == 1680
    assert xl["model.diffusion_model.label_emb.0.0.weight"].shape == (1280, 2816)
    assert "model.diffusion_model.input_blocks.8.1.transformer_blocks.9.ff.net.0.proj.weight" in xl
    assert "model.diffusion_model.output_blocks.5.2.conv.bias" in xl
    plain = unet_file("celebahq")
    assert plain["model.diffusion_model.middle_block.1.qkv.weight"].shape == (3 * 896, 896, 1)
    assert plain["model.diffusion_model.output_blocks.3.1.proj_out.weight"].shape == (672, 672, 1)
    vae = vae_file()
    assert len(vae) == 248
    assert vae["first_stage_model.encoder.mid.attn_1.q.weight"].shape == (512, 512, 1, 1)
    assert "first_stage_model.decoder.up.3.upsample.conv.weight" in vae
    assert "first_stage_model.decoder.up.0.upsample.conv.weight" not in vae
    assert "first_stage_model.decoder.up.1.block.0.nin_shortcut.weight" in vae
    assert "first_stage_model.encoder.down.1.block.0.nin_shortcut.weight" in vae
    words = their_shapes(original.bert(BERT), text_shapes(BERT))
    assert len(words) == 4 + 32 * 13
    name = "cond_stage_model.transformer.attn_layers.layers.63.1.net.0.0.weight"
    assert words[name].shape == (5120, 1280)
    assert "cond_stage_model.transformer.attn_layers.layers.62.1.to_out.bias" in words
    tower = clip_g_file(XL_SECOND)
    assert len(tower) == 5 + 32 * 12
    name = f"{XL_SECOND}transformer.resblocks.31.attn.in_proj_weight"
    assert tower[name].shape == (3840, 1280)


TEXTS = {
    "clip": dict(width=768, layers=12, projection=768, act="quick_gelu"),
    "clip h": dict(width=1024, layers=23, projection=1024),
    "clip g": dict(width=1280, layers=32, projection=1280, projects=True),
}


@pytest.mark.parametrize("family", FILES)
def test_a_published_family_is_recognised_by_its_shapes(family):
    tensors = FILES[family]()
    found = recognise(tensors)
    assert found.family == family
    parts = original.split(tensors, found.prefixes)
    assert sum(map(len, parts.values())) == len(tensors)
    net, noise = found.configs["unet"], found.configs["scheduler"]
    v = family == "stable-diffusion-2"
    assert noise["prediction_type"] == ("v_prediction" if v else "epsilon")
    assert noise["beta_end"] == (0.0195 if "unconditional" in family else 0.012)
    reads = {"inpainting": 9, "instruct": 8, "depth": 5}.get(family.split("-")[-1])
    assert net["in_channels"] == (reads or net["out_channels"])
    assert net["layers_per_block"] == 2
    if "unconditional" in family:
        assert net["_class_name"] == "UNet2DModel"
        assert net["block_out_channels"] == (224, 448, 672, 896)
        assert net["down_block_types"] == ("DownBlock2D", *("AttnDownBlock2D",) * 3)
        assert net["attention_head_dim"] == 32
        return
    assert net["_class_name"] == "UNet2DConditionModel"
    xl, refiner = "xl" in family, "refiner" in family
    attends = [0, 1, 1, 0] if refiner else [0, 1, 1] if xl else [1, 1, 1, 0]
    kinds = tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends)
    assert net["down_block_types"] == kinds
    assert net["up_block_types"] == tuple(k.replace("Down", "Up") for k in kinds[::-1])
    assert net["transformer_layers_per_block"] == (4 if refiner else [1, 2, 10] if xl else 1)
    heads = (6, 12, 24, 24) if refiner else (5, 10, 20) if xl else (5, 10, 20, 20)
    assert net["attention_head_dim"] == (heads if xl or "-2" in family else 8)
    assert net["use_linear_projection"] == (xl or "-2" in family)
    assert (net.get("addition_embed_type") == "text_time") == xl
    assert net.get("projection_class_embeddings_input_dim") == (
        2560 if refiner else 2816 if xl else None
    )
    assert found.configs["vae"] == original_configs.autoencoder(
        channels=(3, 3),
        widths=(128, 256, 512, 512),
        blocks=2,
        z_channels=4,
        embed=4,
        scale=0.13025 if xl else 0.18215,
    ) | ({"force_upcast": True} if xl else {})
    texts = {k: c for k, c in found.configs.items() if k.startswith("text")}
    expected = {
        k: original_configs.clip_text(**TEXTS[which])
        for k, which in (
            (
                {"text_encoder_2": "clip g"}
                if refiner
                else {"text_encoder": "clip", "text_encoder_2": "clip g"}
            )
            if xl
            else {"text_encoder": "clip h" if "-2" in family else "clip"}
        ).items()
    }
    if family == "ldm-text":
        expected = {"text_encoder": original_configs.bert_text(width=1280, layers=32)}
    assert texts == expected


def test_a_config_goes_before_what_is_recognised():
    tensors = FILES["stable-diffusion-2"]()
    found = recognise(tensors, {"scheduler": {"prediction_type": "epsilon"}})
    assert found.configs["scheduler"]["prediction_type"] == "epsilon"
    assert found.configs["unet"] == recognise(tensors).configs["unet"]
    marked = unet_file("xl") | {"v_pred": jnp.zeros(0), "ztsnr": jnp.zeros(0)}
    found = recognise(marked)
    assert found.configs["scheduler"]["prediction_type"] == "v_prediction"
    assert found.configs["scheduler"]["rescale_betas_zero_snr"]
    assert found.configs["unet"]["addition_embed_type"] == "text_time"
    assert "unet" in original.split(marked, found.prefixes)


def test_a_file_of_an_autoencoder_alone():
    found = recognise(vae_file(""))
    assert found.family == "autoencoder"
    assert found.prefixes == {"vae": ""}
    assert found.configs["vae"]["block_out_channels"] == (128, 256, 512, 512)
    assert "scaling_factor" not in found.configs["vae"]


def test_a_tower_that_was_written_without_its_last_layer_keeps_all_it_has():
    tensors = sd2_file() | their_shapes(original.open_clip(), text_shapes(CLIP_H))
    assert recognise(tensors).configs["text_encoder"]["num_hidden_layers"] == 23


SMALL = dict(width=8, mults=(1, 2), blocks=1, groups=4)


def small_unet(tokens=6, **settings):
    network = unet.UNet(**SMALL | settings)
    return original.unet(network), lambda: unet_shapes(network, tokens=tokens)


def small(rows, shapes, model):
    return rows, lambda: shapes(model)


SMALL_VAE = autoencoder.KLAutoencoder(attention=(False, True), **SMALL)
SMALL_TEXT = text.TextTransformer(vocab=11, width=6, layers=2, heads=2, head_dim=5)
SMALL_CLIP = clip.TextEncoder(vocab=11, width=6, layers=2, heads=2, hidden=9, projection=7)
ROUND = {
    "transformer": small_unet(attention=(1, 0), heads=2, vector=3),
    "linear": small_unet(attention=(0, 2), middle=2, heads=2, projection="linear"),
    "plain": small_unet(None, attention=(0, 1), head_dim=4, transformer=False, blocks=2),
    "blocks that resample": small_unet(attention=(1, 1), heads=2, resample_blocks=True),
    "no attention in the middle": small_unet(attention=(1, 0), middle=0, heads=2),
    "autoencoder": small(original.autoencoder(SMALL_VAE), autoencoder_shapes, SMALL_VAE),
    "autoencoder alone": small(original.autoencoder(SMALL_VAE, ""), autoencoder_shapes, SMALL_VAE),
    "bert": small(original.bert(SMALL_TEXT), text_shapes, SMALL_TEXT),
    "open clip": small(original.open_clip(), text_shapes, SMALL_CLIP),
}


@pytest.mark.parametrize("kind", ROUND)
def test_out_and_in_again_is_the_identity(kind, tmp_path):
    rows, shapes = ROUND[kind]
    params = like(shapes())
    tensors = original.to_original([(rows, params)])
    files.write(tmp_path / "model.safetensors", tensors)
    again = table.load(
        rows, jax.eval_shape(lambda: params), files.read(tmp_path / "model.safetensors")
    )
    assert_equal(again, params)
    back = original.to_original([(rows, again)])
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].tobytes() == tensor.tobytes()


def test_a_whole_file_is_taken_apart_and_put_together():
    rows, shapes = zip(*(ROUND[k] for k in ("transformer", "autoencoder", "bert")), strict=True)
    params = [like(s(), seed) for seed, s in enumerate(shapes)]
    tensors = original.to_original(zip(rows, params, strict=True))
    beside = (
        "model_ema.diffusion_modelinput_blocks00weight",
        "betas",
        "sqrt_one_minus_alphas_cumprod",
        "cond_stage_model.transformer.to_logits.weight",
        "cond_stage_model.transformer.text_model.embeddings.position_ids",
        "first_stage_model.loss.logvar",
    )
    prefixes = dict(
        unet=original.UNET, vae=original.VAE, text_encoder="cond_stage_model.transformer."
    )
    whole = tensors | {name: np.zeros(1) for name in beside}
    parts = original.split(whole, prefixes)
    for part, table_of, p in zip(prefixes, rows, params, strict=True):
        assert_equal(table.load(table_of, jax.eval_shape(lambda p=p: p), parts[part]), p)
    with pytest.raises(table.Mismatch, match=r"belong to none of \['unet', 'vae'\]"):
        original.split(whole, {k: v for k, v in prefixes.items() if k != "text_encoder"})
    few = {k: v for k, v in prefixes.items() if k != "text_encoder"}
    assert original.split(whole, few, ignore=(r"cond_stage_model\..*",)).keys() == few.keys()
    with pytest.raises(table.Mismatch, match="two components have the tensor"):
        original.to_original([(rows[0], params[0]), (rows[0], params[0])])


def test_averages_take_the_place_of_weights():
    name = "model.diffusion_model.input_blocks.0.0.weight"
    average = "model_ema.diffusion_modelinput_blocks00weight"
    tensors = {name: 1, average: 2, "model_ema.decay": 3, "first_stage_model.encoder": 4}
    assert original.averaged(tensors) == tensors | {name: 2}
    del tensors[average]
    with pytest.raises(table.Mismatch, match="lacks 1 of 1 averages"):
        original.averaged(tensors)


def test_stable_diffusion_2_does_without_the_last_layer_and_the_projection():
    whole, used = SMALL_CLIP, SMALL_CLIP.clone(layers=1, projection=None)
    params = like(text_shapes(whole))
    tensors = table.export(original.open_clip(), params)
    unused = original.open_clip_unused(used)
    loaded = table.load(original.open_clip(), text_shapes(used), tensors, unused)
    assert_equal(loaded["layer_0"], params["layer_0"])
    with pytest.raises(table.Mismatch, match="13 tensors are not used"):
        table.load(original.open_clip(), text_shapes(used), tensors)
    back = table.export(original.open_clip(), loaded)
    missing = tensors.keys() - back.keys()
    assert missing == {n for n in tensors if ".resblocks.1." in n or n.endswith("text_projection")}


def test_what_shapes_do_not_tell_is_asked_for():
    rows, shapes = ROUND["transformer"]
    tensors = their_shapes(rows, shapes())
    with pytest.raises(ValueError, match="how many heads"):
        recognise(tensors)
    asked = {"unet": {"attention_head_dim": 2}}
    with pytest.raises(ValueError, match=r"beta_start.*prediction_type"):
        recognise(tensors, asked)
    found = recognise(tensors, asked | {"scheduler": original_configs.scheduler()})
    assert found.family == "other"
    assert found.configs["unet"]["attention_head_dim"] == 2
    assert found.configs["unet"]["class_embed_type"] == "projection"
    assert found.configs["unet"]["block_out_channels"] == (8, 16)
    rows, shapes = ROUND["plain"]
    with pytest.raises(ValueError, match="width of its heads"):
        recognise(their_shapes(rows, shapes()))


def test_what_is_no_original_checkpoint_is_told():
    with pytest.raises(ValueError, match=r"no tensors of an original .*conv_in.weight"):
        recognise({"conv_in.weight": np.zeros(1), "down_blocks.0": np.zeros(1)})
    with pytest.raises(ValueError, match="edm_mean"):
        recognise(unet_file("xl") | {"edm_mean": np.zeros(4)})
    cut = unet_file("sd1")
    del cut["model.diffusion_model.out.2.weight"]
    with pytest.raises(ValueError, match=r"no tensor 'out.2.weight'"):
        recognise(cut)
    gone = {n: t for n, t in unet_file("sd1").items() if ".input_blocks.4." not in n}
    with pytest.raises(ValueError, match="'input_blocks' the checkpoint has the numbers"):
        recognise(gone)
    rows, shapes = ROUND["blocks that resample"]
    with pytest.raises(ValueError, match="resblock_updown"):
        recognise(their_shapes(rows, shapes()))
