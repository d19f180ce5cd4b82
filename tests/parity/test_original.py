"""Our original files against diffusers' own converters: from what we write they make exactly their state dict again.

For what they cannot convert, the plain attention of the unconditional models, the reference is torch, by hand.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from ldm_jax.models import autoencoder, clip, text, unet
from ldm_jax.nn import attention
from ldm_jax.pretrained import components, controlnets
from ldm_jax.types import Cond
from ldm_jax.weights import autoencoder as their_autoencoder
from ldm_jax.weights import clip as their_clip
from ldm_jax.weights import (
    files,
    original,
    original_configs,
    original_unclip,
    original_yaml,
    pickles,
    table,
)
from ldm_jax.weights import unet as their_unet
from ldm_jax.weights.recognise import recognise
from tests import test_original, test_original_yaml
from tests.drawn import like
from tests.parity import weights

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
single_file = pytest.importorskip("diffusers.loaders.single_file_utils")
pytestmark = pytest.mark.parity

KEY = jax.random.key(0)


def as_torch(tensors):
    return {name: torch.from_numpy(np.array(tensor)) for name, tensor in tensors.items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def unets():
    """Reduced models with the structure of 1, 2 and XL: what diffusers builds, and our settings."""
    common = dict(norm_num_groups=4, layers_per_block=2)
    attends, plain = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")

    def kinds(*levels):
        both = [attends if level else plain for level in levels]
        return dict(
            down_block_types=[b[0] for b in both], up_block_types=[b[1] for b in both[::-1]]
        )

    one = dict(block_out_channels=(8, 16, 24), cross_attention_dim=10, attention_head_dim=2)
    two = one | dict(use_linear_projection=True, attention_head_dim=(2, 4, 4), in_channels=9)
    xl = dict(
        block_out_channels=(8, 16, 16),
        cross_attention_dim=10,
        attention_head_dim=(1, 2, 2),
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2, 3),
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=12,
    )
    unclip = two | dict(class_embed_type="projection", projection_class_embeddings_input_dim=12)
    ours = dict(width=8, mults=(1, 2, 3), groups=4, attention=(1, 1, 0), heads=2, out_channels=4)
    ours_two = ours | dict(projection="linear", heads=(2, 4, 4))
    ours_xl = ours_two | dict(
        mults=(1, 2, 2), attention=(0, 2, 3), middle=3, heads=(1, 2, 2), vector=12
    )
    return {
        "1": (common | one | kinds(1, 1, 0), ours),
        "2 inpainting": (common | two | kinds(1, 1, 0), ours_two),
        "unclip": (common | unclip | kinds(1, 1, 0), ours_two | dict(vector=12)),
        "xl": (common | xl | kinds(0, 1, 1), ours_xl),
    }


@pytest.mark.parametrize("kind", unets())
def test_unet(kind, tmp_path):
    config, settings = unets()[kind]
    theirs = weights.randomised(diffusers.UNet2DConditionModel(**config))
    network = unet.UNet(**settings)
    x = jnp.zeros((1, 8, 8, config.get("in_channels", 4)))
    cond = Cond(
        tokens=jnp.zeros((1, 3, 10)),
        vector=jnp.zeros((1, network.vector)) if network.vector else None,
    )
    shapes = jax.eval_shape(network.init, KEY, x, jnp.zeros(1), cond)["params"]
    state = theirs.state_dict()
    renamed = {
        name.replace("add_embedding", "class_embedding"): t.numpy() for name, t in state.items()
    }
    params = table.load(their_unet.table(), shapes, renamed)

    rows = original.unet(network)
    files.write(tmp_path / "a.safetensors", original.to_original([(rows, params)]))
    written = files.read(tmp_path / "a.safetensors")
    found = single_file.convert_ldm_unet_checkpoint(as_torch(written), dict(theirs.config))
    assert_same(found, state)

    # The same file recognised, with what its shapes do not tell.
    asked = {"unet": {"attention_head_dim": config["attention_head_dim"], "norm_num_groups": 4}}
    marked = written | ({"conditioner.x": np.zeros(1)} if kind == "xl" else {})
    described = recognise(marked, asked | {"scheduler": original_configs.scheduler()})
    again = diffusers.UNet2DConditionModel.from_config(described.configs["unet"])
    again.load_state_dict(found)

    # As a checkpoint of torch it gives the same parameters.
    torch.save({"state_dict": as_torch(written), "callbacks": {}}, tmp_path / "a.ckpt")
    loaded = table.load(rows, shapes, pickles.read(tmp_path / "a.ckpt"))
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_controlnet(tmp_path):
    """What we write is theirs through diffusers' converter, and recognised; so are diffusers' names."""
    config = dict(
        block_out_channels=(8, 16, 16),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        cross_attention_dim=10,
        attention_head_dim=(1, 2, 2),
        use_linear_projection=True,
        norm_num_groups=4,
        conditioning_embedding_out_channels=(4, 6, 8, 12),  # their converter takes four for granted
    )
    theirs = weights.randomised(diffusers.ControlNetModel(**config))
    state = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    asked = {key: config[key] for key in ("attention_head_dim", "norm_num_groups")}

    def loaded(tensors):
        stored = controlnets.of_tensors(tensors, asked)
        made = components.make("ControlNetModel", stored.config, jnp.float32)
        given = stored.tensors(made)
        made.check(given)
        return made.module, table.load(given.rows, made.shapes, given.tensors, given.ignore)

    module, params = loaded(state)
    written = original.to_original([(original.controlnet(module), params)])
    assert_same(
        single_file.convert_controlnet_checkpoint(as_torch(written), theirs.config),
        theirs.state_dict(),
    )
    bare = {name.removeprefix("control_model."): tensor for name, tensor in written.items()}
    for tensors in (written, bare):
        again, found = loaded(tensors)
        assert again == module
        jax.tree.map(np.testing.assert_array_equal, found, params)


def test_autoencoder(tmp_path):
    theirs = weights.randomised(
        diffusers.AutoencoderKL(
            block_out_channels=(8, 16, 16),
            layers_per_block=2,
            latent_channels=4,
            norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
        )
    )
    model = autoencoder.KLAutoencoder(width=8, mults=(1, 2, 2), groups=4)
    shapes = jax.eval_shape(model.init, KEY, jnp.zeros((1, 8, 8, 3)), KEY)["params"]
    params = weights.copied(theirs, shapes, their_autoencoder.table())
    written = original.to_original([(original.autoencoder(model), params)])
    found = single_file.convert_ldm_vae_checkpoint(as_torch(written), dict(theirs.config))
    assert_same(found, theirs.state_dict())

    alone = original.to_original([(original.autoencoder(model, ""), params)])
    config = recognise(alone).configs["vae"] | {"norm_num_groups": 4}
    diffusers.AutoencoderKL.from_config(config).load_state_dict(found)


def texts(**more):
    config = dict(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=20,
        num_hidden_layers=3,
        num_attention_heads=1,
        projection_dim=7,
        max_position_embeddings=11,
        hidden_act="gelu",
    )
    model = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**config | more))
    ours = clip.TextEncoder(
        vocab=50,
        width=64,
        layers=3,
        heads=1,
        hidden=20,
        activation="gelu",
        length=11,
        projection=model.config.projection_dim,
    )
    shapes = jax.eval_shape(ours.init, KEY, jnp.zeros((1, 4), jnp.int32))["params"]
    state = weights.randomised(model).state_dict()
    state = {name: t for name, t in state.items() if "position_ids" not in name}
    arrays = {name: t.numpy() for name, t in state.items()}
    return model, state, table.load(their_clip.text_table(), shapes, arrays)


class Tower(torch.nn.Module):
    """The image tower of open_clip and of OpenAI's code, by hand, with torch's own attention."""

    def __init__(self, width=32, heads=16, inner=48, patch=4, size=12, out=10):
        super().__init__()
        n = (size // patch) ** 2
        self.conv1 = torch.nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = torch.nn.Parameter(torch.zeros(width))
        self.positional_embedding = torch.nn.Parameter(torch.zeros(n + 1, width))
        self.ln_pre, self.ln_post = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.proj = torch.nn.Parameter(torch.zeros(width, out))
        self.transformer = torch.nn.ModuleDict(
            dict(resblocks=torch.nn.ModuleList([self.block(width, heads, inner) for _ in "12"]))
        )

    def block(self, width, heads, inner):
        mlp = dict(c_fc=torch.nn.Linear(width, inner), c_proj=torch.nn.Linear(inner, width))
        parts = dict(
            ln_1=torch.nn.LayerNorm(width),
            ln_2=torch.nn.LayerNorm(width),
            attn=torch.nn.MultiheadAttention(width, heads, batch_first=True),
            mlp=torch.nn.ModuleDict(mlp),
        )
        return torch.nn.ModuleDict(parts)

    def forward(self, x):
        x = self.conv1(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1)
        x = self.ln_pre(x + self.positional_embedding)
        for of in self.transformer["resblocks"]:
            y = of["ln_1"](x)
            x = x + of["attn"](y, y, y, need_weights=False)[0]
            y = torch.nn.functional.gelu(of["mlp"]["c_fc"](of["ln_2"](x)))
            x = x + of["mlp"]["c_proj"](y)
        return self.ln_post(x[:, 0]) @ self.proj


def test_image_tower():
    theirs = weights.randomised(Tower())
    tensors = {f"embedder.model.visual.{k}": v.numpy() for k, v in theirs.state_dict().items()}
    config = original_unclip.recognise(tensors).configs["image_encoder"]
    made = components.make("CLIPVisionModelWithProjection", config, jnp.float32)
    params = table.load(original_unclip.vision(), made.shapes, tensors)
    x = np.random.default_rng(0).standard_normal((2, 12, 12, 3)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(x).permute(0, 3, 1, 2))
    found = made.module.apply({"params": params}, jnp.asarray(x)).pooled
    assert weights.relative_error(np.asarray(found), expected) < 1e-5


def test_open_clip():
    # Theirs splits q, k and v at the height of the projection, so the two must agree.
    model, state, params = texts(projection_dim=64)
    prefix = "conditioner.embedders.1.model."
    written = original.to_original([(original.open_clip(prefix), params)])
    found = single_file.convert_open_clip_checkpoint(model, as_torch(written), prefix)
    assert_same(found, state)


def test_clip():
    _, state, params = texts()
    prefix = "conditioner.embedders.0.transformer."
    written = original.to_original([(original.clip(prefix), params)])
    found = single_file.convert_ldm_clip_checkpoint(as_torch(written))
    assert_same(found, state)


KINDS = {
    "stable-diffusion-1": "v1",
    "stable-diffusion-1-inpainting": "inpainting",
    "stable-diffusion-1-instruct": "instruct-pix2pix",
    "stable-diffusion-2": "v2",
    "stable-diffusion-2-inpainting": "inpainting_v2",
    "stable-diffusion-2-depth": "v2",
    "stable-diffusion-xl": "xl_base",
    "stable-diffusion-xl-refiner": "xl_refiner",
}


@pytest.mark.parametrize("family", KINDS)
def test_diffusers_recognises_the_same(family):
    tensors = test_original.FILES[family]()
    assert single_file.infer_diffusers_model_type(tensors) == KINDS[family]
    assert recognise(tensors).family == family


def plain(value):
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("content", ["V1", "V2", "XL"])
def test_yaml_files_say_the_same_to_diffusers(content, tmp_path):
    content = getattr(test_original_yaml, content)
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(content))
    ours = original_yaml.from_yaml(tmp_path / "a.yaml")
    content = yaml.safe_load((tmp_path / "a.yaml").read_text())
    # The tensors, here none, tell them nothing but the size of images.
    network = single_file.create_unet_diffusers_config_from_ldm(content, {})
    vae = single_file.create_vae_diffusers_config_from_ldm(content, {})
    for found, expected in ((ours["unet"], network), (ours["vae"], vae)):
        expected.pop("sample_size")
        assert {k: plain(found.get(k)) for k in expected} == {
            k: plain(v) for k, v in expected.items()
        }


def nested(tensors):
    """The modules that hold these tensors; numbers are places in a list."""
    tree = {}
    for name, tensor in tensors.items():
        *path, leaf = name.split(".")
        at = tree
        for part in path:
            at = at.setdefault(part, {})
        at[leaf] = torch.nn.Parameter(tensor)

    def build(node):
        if not isinstance(node, dict):
            return node
        if all(key.isdigit() for key in node):
            most = max(map(int, node)) + 1
            return [build(node[str(i)]) if str(i) in node else None for i in range(most)]
        return SimpleNamespace(**{key: build(value) for key, value in node.items()})

    return build(tree)


def test_text_encoder_of_the_paper():
    from diffusers.pipelines.latent_diffusion import pipeline_latent_diffusion as pipeline
    from diffusers.pipelines.stable_diffusion.convert_from_ckpt import convert_ldm_bert_checkpoint

    ours = text.TextTransformer(vocab=50, width=24, layers=3, length=11, heads=2, head_dim=6)
    ids = np.random.default_rng(0).integers(0, 50, (2, 11))
    params = like(jax.eval_shape(ours.init, KEY, jnp.asarray(ids))["params"])
    written = as_torch(original.to_original([(original.bert(ours, "transformer."), params)]))
    logits = {f"transformer.to_logits.{n}": torch.zeros(50) for n in ("weight", "bias")}
    config = pipeline.LDMBertConfig(
        vocab_size=50,
        max_position_embeddings=11,
        encoder_layers=3,
        encoder_ffn_dim=96,
        encoder_attention_heads=2,
        head_dim=6,
        d_model=24,
    )
    theirs = convert_ldm_bert_checkpoint(nested(written | logits), config)
    with torch.no_grad():
        reference = theirs.model(torch.from_numpy(ids))[0].numpy()
    y = jax.jit(ours.apply)({"params": params}, jnp.asarray(ids))
    assert np.linalg.norm(y - reference) / np.linalg.norm(reference) < 1e-4


def test_plain_attention():
    """`AttentionBlock` with `QKVAttentionLegacy`: heads outermost, then q, k and v."""
    heads, width = 3, 12
    block = attention.AttentionBlock(heads=heads, groups=4)
    x = np.random.default_rng(0).standard_normal((2, 4, 5, width)).astype(np.float32)
    params = like(jax.eval_shape(block.init, KEY, jnp.asarray(x))["params"])
    tensors = as_torch(table.export(original.plain_attention(heads), params))
    h = torch.from_numpy(x).flatten(1, 2).transpose(1, 2)
    n = torch.nn.functional.group_norm(h, 4, tensors["norm.weight"], tensors["norm.bias"])
    conv = torch.nn.functional.conv1d
    qkv = conv(n, tensors["qkv.weight"], tensors["qkv.bias"])
    q, k, v = qkv.reshape(2 * heads, -1, 20).chunk(3, dim=1)
    a = torch.softmax(q.transpose(1, 2) @ k / (width // heads) ** 0.5, dim=-1)
    out = (v @ a.transpose(1, 2)).reshape(2, width, 20)
    y = h + conv(out, tensors["proj_out.weight"], tensors["proj_out.bias"])
    reference = y.transpose(1, 2).reshape(x.shape).numpy()
    np.testing.assert_allclose(
        jax.jit(block.apply)({"params": params}, x), reference, rtol=1e-4, atol=1e-5
    )
