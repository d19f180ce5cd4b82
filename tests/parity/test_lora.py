"""LoRA files against diffusers with PEFT: the same files, loaded by both, the same outputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import tree
from ldm_jax.models import unet
from ldm_jax.types import Cond
from ldm_jax.weights import blocks, files, lora, lora_files, table
from ldm_jax.weights import clip as their_clip
from ldm_jax.weights import unet as their
from tests.parity import weights

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.parity

T = np.array([0.25, 731.0], np.float32)
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
EVERYTHING = [
    *ATTENTION,
    *("proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut"),
    *("time_emb_proj", "conv_in", "conv_out", "downsamplers.0.conv", "upsamplers.0.conv"),
    *("time_embedding.linear_1",),
]


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def their_unet(linear):
    return weights.randomised(
        diffusers.UNet2DConditionModel(
            in_channels=4,
            out_channels=4,
            block_out_channels=(12, 24),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(2, 3),  # despite its name, the number of heads
            cross_attention_dim=10,
            norm_num_groups=4,
            use_linear_projection=linear,
        )
    )


X, TOKENS = random(2, 8, 12, 4), random(2, 7, 10, seed=2)


@functools.cache
def ours(linear):
    """Our U-Net with the weights of theirs: parameters, names, and the function of LoRAs and their weights."""
    network = unet.UNet(
        width=12,
        mults=(1, 2),
        attention=(0, 1),
        heads=(2, 3),
        groups=4,
        projection="linear" if linear else "conv",
    )
    inputs = jnp.asarray(X), jnp.asarray(T), Cond(tokens=jnp.asarray(TOKENS))
    shapes = jax.eval_shape(network.init, jax.random.key(0), *inputs)["params"]
    params = weights.copied(their_unet(linear), shapes, their.table())
    names = lora_files.their_names({"unet": (params, [their.table()])})

    def apply(params, loras, at):
        return network.apply({"params": lora.applied(params, loras, at)}, *inputs)

    return params, names, jax.jit(apply)


class Both:
    """Their U-Net and ours with the same weights, on one batch."""

    def __init__(self, linear):
        self.theirs = their_unet(linear)
        self.params, self.names, self.apply = ours(linear)

    def reference(self):
        with torch.no_grad():
            x = torch.from_numpy(X).permute(0, 3, 1, 2)
            tokens = torch.from_numpy(TOKENS)
            return self.theirs(x, torch.from_numpy(T), encoder_hidden_states=tokens).sample

    def assert_same(self, loras, at, floor=0.05):
        """Both ways of ours give what theirs gives now, and this is not what it gives without."""
        reference = self.reference()
        aside = self.apply(self.params, loras, at)
        merged = self.apply(lora.merge(self.params, loras, at), [], [])
        plain = self.apply(self.params, [], [])
        assert weights.relative_error(plain, reference) > floor
        errors = weights.relative_error(aside, reference), weights.relative_error(merged, reference)
        print("relative errors, on the side and merged:", *errors)
        assert max(errors) < 1e-5


def add_adapter(model, name, config, seed=0):
    """A LoRA with random weights in their model."""
    generator = torch.Generator().manual_seed(seed)
    peft.inject_adapter_in_model(config, model, name)
    with torch.no_grad():
        for path, p in model.named_parameters():
            if name in path.split("."):
                noise = torch.randn(p.shape, generator=generator)
                if "magnitude" in path:  # of DoRA: near the lengths that they have
                    p.mul_(1 + 0.2 * noise)
                    continue
                fan_in = p.shape[0] if "_t" in path else p[0].numel()
                p.copy_(0.5 * noise / fan_in**0.5)


def state(model, name):
    return peft.get_peft_model_state_dict(model, adapter_name=name)


@pytest.mark.parametrize("linear", [False, True])
def test_file_of_diffusers_with_ranks_alphas_and_weights_of_several(linear, tmp_path):
    both = Both(linear)
    configs = {
        "a": peft.LoraConfig(
            r=3,
            lora_alpha=5,
            target_modules=EVERYTHING,
            rank_pattern={"to_k": 2, "conv1": 4},
            alpha_pattern={"to_k": 7, "mid_block.resnets.0.conv1": 1.5},
        ),
        "b": peft.LoraConfig(r=4, lora_alpha=2, target_modules=ATTENTION, use_rslora=True),
    }
    loras = []
    for seed, (name, config) in enumerate(configs.items()):
        add_adapter(both.theirs, name, config, seed)
        diffusers.StableDiffusionPipeline.save_lora_weights(
            tmp_path / name,
            unet_lora_layers=state(both.theirs, name),
            unet_lora_adapter_metadata=config.to_dict(),
        )
        path = tmp_path / name / "pytorch_lora_weights.safetensors"
        loras.append(lora_files.load(path, both.names)["unet"])
    assert len(loras[0]) > 40
    both.theirs._hf_peft_config_loaded = True
    both.theirs.peft_config = configs
    for at in ([1.0, 0.0], [0.7, -0.4]):
        both.theirs.set_adapters(["a", "b"], at)
        both.assert_same(loras, at)


def test_dora(tmp_path):
    """Of dense layers and convolutions, in PEFT's names and in kohya's; one at a time, at any weight."""
    both = Both(False)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=EVERYTHING, use_dora=True)
    add_adapter(both.theirs, "a", config)
    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=state(both.theirs, "a"),
        unet_lora_adapter_metadata=config.to_dict(),
    )
    path = tmp_path / "pytorch_lora_weights.safetensors"
    found = lora_files.load(path, both.names)["unet"]
    assert all(delta.magnitude is not None for delta in found.values())
    both.theirs._hf_peft_config_loaded = True
    both.theirs.peft_config = {"a": config}
    for at in (1.0, 0.6):
        both.theirs.set_adapters(["a"], [at])
        both.assert_same([found], [at])
    tensors = {name: np.asarray(tensor) for name, tensor in files.read(path).items()}
    scales = {
        name.replace("lora_magnitude_vector", "dora_scale"): x.reshape(
            -1, *(1,) * max(x.ndim - 1, 1)
        )
        for name, x in tensors.items()
        if name.endswith("lora_magnitude_vector")
    }
    assert len(scales) == len(found)
    rest = {name: x for name, x in tensors.items() if not name.endswith("lora_magnitude_vector")}
    again = lora_files.read(rest | scales, both.names, files.metadata(path))["unet"]
    jax.tree.map(np.testing.assert_array_equal, again, found)


FORMS = {
    "PEFT": lambda m, part: f"unet.{m}.lora_{part}.weight",
    "named adapter": lambda m, part: f"base_model.model.{m}.lora_{part}.default.weight",
    "halves": lambda m, part: f"unet.{m}.lora.{'down' if part == 'A' else 'up'}.weight",
    "processors": lambda m, part: (
        f"unet.{m.replace('.to_', '.processor.to_').replace('to_out.0', 'to_out')}_lora."
        f"{'down' if part == 'A' else 'up'}.weight"
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("prefixed", [False, True])
def test_forms_of_diffusers_mean_the_same(form, prefixed):
    names, source, theirs = ours(False)[1], Both(False), Both(False)
    config = peft.LoraConfig(r=3, lora_alpha=3, target_modules=ATTENTION)
    add_adapter(source.theirs, "x", config)
    plain = {f"unet.{k}": t for k, t in state(source.theirs, "x").items()}
    tensors = {}
    for key, tensor in plain.items():
        module, part = key.removeprefix("unet.").removesuffix(".weight").split(".lora_")
        name = FORMS[form](module, part)
        tensors[name if prefixed else name.removeprefix("unet.")] = tensor
    if form != "named adapter":  # PEFT's own, which diffusers does not read
        theirs.theirs.load_lora_adapter(dict(tensors), prefix="unet" if prefixed else None)
        np.testing.assert_allclose(theirs.reference(), source.reference(), rtol=1e-6, atol=1e-6)
    expected = lora_files.read({k: t.numpy() for k, t in plain.items()}, names)
    found = lora_files.read({k: t.numpy() for k, t in tensors.items()}, names)
    assert len(found["unet"]) == 48
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def kohya(tensors, alpha):
    """The same LoRA under the names that kohya's scripts write."""
    out = {}
    for key, tensor in tensors.items():
        module, part = key.removesuffix(".weight").split(".lora_")
        module = "lora_unet_" + module.replace(".", "_")
        out[f"{module}.lora_{'down' if part == 'A' else 'up'}.weight"] = tensor
        out[f"{module}.alpha"] = torch.tensor(alpha(module))
    return out


@pytest.mark.parametrize("linear", [False, True])
def test_kohya(linear):
    both = Both(linear)
    source = their_unet(linear)
    add_adapter(source, "x", peft.LoraConfig(r=4, target_modules=EVERYTHING))
    # Theirs loses the alphas of attention where they differ from the most frequent one (its patterns name no module).
    tensors = kohya(
        state(source, "x"), lambda m: 6.0 if "conv1" in m or "_ff_" in m or "proj_in" in m else 1.5
    )
    read = lora_files.read({k: t.numpy() for k, t in tensors.items()}, both.names)
    converted, alphas = diffusers.StableDiffusionPipeline.lora_state_dict(dict(tensors))
    both.theirs.load_lora_adapter(converted, prefix="unet", network_alphas=alphas)
    both.assert_same([read["unet"]], [1.0])
    # The names that their converter gives mean the same to us.
    again = {k: t.numpy() for k, t in converted.items()}
    again |= {k: np.float32(a) for k, a in alphas.items()}
    again = lora_files.read(again, both.names)
    jax.tree.map(np.testing.assert_array_equal, again, read)


def test_blocks_in_the_original_numbers():
    """kohya's files for SDXL number the blocks as generative-models does."""
    res = {"conv1": "in_layers.2", "emb": "emb_layers.1", "conv2": "out_layers.3"}
    res = tuple(table.Row(*pair) for pair in (res | {"skip": "skip_connection"}).items())
    places = {
        f"down_{i}/res_{j}": f"input_blocks.{1 + 3 * i + j}.0" for i in (0, 1) for j in (0, 1)
    }
    places |= {f"up_{i}/res_{j}": f"output_blocks.{3 * i + j}.0" for i in (0, 1) for j in range(3)}
    places |= {"mid/res_0": "middle_block.0", "mid/res_1": "middle_block.2"}
    attention = {f"down_1/attn_{j}": f"input_blocks.{4 + j}.1" for j in (0, 1)}
    attention |= {f"up_0/attn_{j}": f"output_blocks.{j}.1" for j in range(3)}
    attention |= {"mid/attn": "middle_block.1"}
    rows = [row for pair in places.items() for row in table.under(*pair, res)]
    rows += [row for a in attention.items() for row in table.under(*a, blocks.TRANSFORMER)]
    single = {"down_0/downsample/conv": "input_blocks.3.0.op", "conv_out": "out.2"}
    single |= {"conv_in": "input_blocks.0.0", "up_0/upsample/conv": "output_blocks.2.2.conv"}
    single |= {"time/in": "time_embed.0", "time/out": "time_embed.2"}
    rows += [table.Row(*pair) for pair in single.items()]

    both = Both(True)
    names = lora_files.their_names({"unet": (both.params, [their.table(), rows])})
    tensors = {}
    for i, name in enumerate(n for n in both.names if n.startswith("lora_unet_")):
        leaf = both.names[name][0]
        place = table.find(rows, leaf.name)
        module = "lora_unet_" + place.name.removesuffix(".weight").replace(".", "_")
        out, into, *space = leaf.whole
        down, up = (
            random(2, into, *space, seed=i),
            random(out, 2, *(1 for _ in space), seed=-i % 99),
        )
        tensors[f"{module}.lora_down.weight"] = torch.from_numpy(down / down[0].size ** 0.5)
        tensors[f"{module}.lora_up.weight"] = torch.from_numpy(up / 4)
        tensors[f"{module}.alpha"] = torch.tensor(1.5)
    found = lora_files.read({k: t.numpy() for k, t in tensors.items()}, names)
    assert found["unet"].keys() == {n for n in tree.names(both.params) if n.endswith("/kernel")}
    converted, alphas = diffusers.StableDiffusionXLPipeline.lora_state_dict(
        dict(tensors), unet_config=both.theirs.config
    )
    both.theirs.load_lora_adapter(converted, prefix="unet", network_alphas=alphas)
    both.assert_same([found["unet"]], [1.0])


KIN = {
    "LoHa": dict(kind="LoHaConfig", r=3),
    "LoHa, CP": dict(kind="LoHaConfig", r=3, use_effective_conv2d=True),
    "LoKr, whole left": dict(kind="LoKrConfig", r=1, decompose_factor=2),
    "LoKr, both apart": dict(kind="LoKrConfig", r=1, decompose_both=True, decompose_factor=6),
    "LoKr, CP": dict(kind="LoKrConfig", r=1, use_effective_conv2d=True, decompose_factor=2),
}


@pytest.mark.parametrize("name", KIN)
def test_relatives_of_lora(name):
    names, theirs = ours(False)[1], their_unet(False)
    settings = dict(KIN[name])
    config = getattr(peft, settings.pop("kind"))(alpha=2, target_modules=EVERYTHING, **settings)
    add_adapter(theirs, "x", config)
    tensors = {f"unet.{k}": t.numpy() for k, t in state(theirs, "x").items()}
    tensors |= {f"{k.rpartition('.')[0]}.alpha": np.float32(config.alpha) for k in tensors}
    assert any("_t" in k for k in tensors) == ("CP" in name)
    found = lora_files.read(tensors, names)["unet"]
    assert len(found) == 120
    for leaf, delta in found.items():
        module = table.their_name(their.table(), leaf).removesuffix(".weight")
        reference = theirs.get_submodule(module).get_delta_weight("x").detach().numpy()
        change = np.moveaxis(lora.change(delta), (-1, -2), (0, 1))
        np.testing.assert_allclose(change, reference, rtol=1e-4, atol=1e-5, err_msg=leaf)


def test_export_is_read_by_diffusers(tmp_path):
    both = Both(False)
    add_adapter(both.theirs, "x", peft.LoraConfig(r=3, lora_alpha=3, target_modules=EVERYTHING))
    tensors = {f"unet.{k}": t.numpy() for k, t in state(both.theirs, "x").items()}
    read = lora_files.read(tensors, both.names)["unet"]
    written = lora.export(read, "unet", their.table())
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert written[name].tobytes() == tensor.tobytes(), name
    # With an alpha, which goes into a half.
    scaled = {name: delta._replace(alpha=np.float32(1.5)) for name, delta in read.items()}
    files.write(tmp_path / "x.safetensors", lora.export(scaled, "unet", their.table()))
    both.theirs = their_unet(False)
    both.theirs.load_lora_adapter(tmp_path / "x.safetensors", prefix="unet")
    both.assert_same([scaled], [1.0])


@pytest.mark.parametrize("projected", [False, True])
def test_text_encoder_in_the_forms_of_kohya_and_diffusers(projected, tmp_path):
    transformers = pytest.importorskip("transformers")
    settings = dict(vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=3)
    settings |= dict(num_attention_heads=3, max_position_embeddings=11, projection_dim=10)
    config = transformers.CLIPTextConfig(**settings, eos_token_id=49)
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    theirs = weights.randomised(kind(config))
    config.architectures = [kind.__name__]
    module = their_clip.text_from_config(config.to_diff_dict())
    ids = np.array([[3, 5, 49, 7, 48, 1, 1], [3, 48, 48, 5, 48, 9, 49]])
    shapes = jax.eval_shape(module.init, jax.random.key(0), ids)["params"]
    params = weights.copied(theirs, shapes, their_clip.text_table(theirs.state_dict()))
    component = "text_encoder_2" if projected else "text_encoder"
    names = lora_files.their_names({component: (params, [their_clip.text_table()])})

    targets = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
    source = kind(config)
    add_adapter(source, "x", peft.LoraConfig(r=3, lora_alpha=3, target_modules=targets))
    plain = {
        k if k.startswith("text_model.") else f"text_model.{k}": t
        for k, t in state(source, "x").items()
    }
    prefix = "lora_te2_" if projected else "lora_te1_"
    tensors = {k.replace("lora_unet_", prefix): t for k, t in kohya(plain, lambda m: 1.5).items()}
    found = lora_files.read({k: t.numpy() for k, t in tensors.items()}, names)[component]
    assert len(found) == 18
    converted, alphas = diffusers.StableDiffusionPipeline.lora_state_dict(dict(tensors))
    again = {k: t.numpy() for k, t in converted.items()}
    again |= {k: np.float32(a) for k, a in alphas.items()}
    jax.tree.map(np.testing.assert_array_equal, lora_files.read(again, names)[component], found)
    diffusers.StableDiffusionPipeline.load_lora_into_text_encoder(
        dict(converted), alphas, theirs, prefix=component, adapter_name="x"
    )
    with torch.no_grad():
        reference = theirs(torch.from_numpy(ids)).last_hidden_state.numpy()
    apply = jax.jit(module.apply)
    merged = apply({"params": lora.merge(params, [found], [1.0])}, ids).tokens
    plain = apply({"params": params}, ids).tokens
    size = np.linalg.norm(reference)
    assert np.linalg.norm(plain - reference) > 0.05 * size
    assert np.linalg.norm(merged - reference) < 1e-5 * size
