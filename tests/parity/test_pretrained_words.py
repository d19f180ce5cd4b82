"""Single files, LoRAs, prompts and noise of a pipeline of diffusers, against diffusers itself."""

import json

import jax
import numpy as np
import pytest

import ldm_jax
from ldm_jax.weights import files
from tests.parity.pipelines import PROMPTS, close, error, first, random, stable_diffusion

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.parity


def same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_single_file_and_back(tmp_path):
    stable_diffusion(tmp_path)
    pipe = ldm_jax.from_pretrained(tmp_path / "theirs")
    pipe.save_pretrained(tmp_path / "single.safetensors", layout="original")
    again = ldm_jax.from_pretrained(tmp_path / "single.safetensors", config=tmp_path / "theirs")
    same(again.component_params(), pipe.component_params())
    tensors = files.read(tmp_path / "single.safetensors")
    state = {name: torch.from_numpy(np.array(tensor)) for name, tensor in tensors.items()}
    torch.save({"state_dict": state, "global_step": 7}, tmp_path / "single.ckpt")
    from_pickle = ldm_jax.from_pretrained(tmp_path / "single.ckpt", config=tmp_path / "theirs")
    same(from_pickle.component_params(), pipe.component_params())
    z = random(1, 8, 8, 4)
    images = [p.text_to_image("a cat", steps=3, latents=z) for p in (pipe, again)]
    np.testing.assert_array_equal(*images)
    with pytest.raises(ValueError, match="holds no tokenizer"):
        ldm_jax.from_pretrained(
            tmp_path / "single.safetensors",
            config={
                name: json.loads((tmp_path / "theirs" / name / file).read_text())
                for name, file in (
                    ("unet", "config.json"),
                    ("vae", "config.json"),
                    ("text_encoder", "config.json"),
                    ("scheduler", "scheduler_config.json"),
                )
            },
        )


def test_loras_at_their_weights(tmp_path):
    theirs = stable_diffusion(tmp_path)
    pipe = ldm_jax.from_pretrained(tmp_path / "theirs")
    for i, name in enumerate(("first", "second")):
        config = dict(r=2 + i, lora_alpha=3, init_lora_weights=False)
        theirs.unet.add_adapter(
            peft.LoraConfig(target_modules=["to_q", "to_v", "conv1"], **config), name
        )
        theirs.text_encoder.add_adapter(
            peft.LoraConfig(target_modules=["q_proj", "fc1"], **config), name
        )
        for network in (theirs.unet, theirs.text_encoder):
            network.set_adapter(name)
        theirs.save_lora_weights(
            tmp_path / name,
            unet_lora_layers=peft.get_peft_model_state_dict(theirs.unet, adapter_name=name),
            text_encoder_lora_layers=peft.get_peft_model_state_dict(
                theirs.text_encoder, adapter_name=name
            ),
            unet_lora_adapter_metadata=theirs.unet.peft_config[name].to_dict(),
            text_encoder_lora_adapter_metadata=theirs.text_encoder.peft_config[name].to_dict(),
        )
    theirs.set_adapters(["first", "second"], [0.8, -0.5])
    z = random(2, 8, 8, 4)
    expected = theirs(
        PROMPTS, num_inference_steps=10, latents=first(z), height=16, width=16, output_type="np"
    ).images
    paths = [tmp_path / n / "pytorch_lora_weights.safetensors" for n in ("first", "second")]
    changed = pipe.with_lora(paths, [0.8, -0.5])
    close(changed.text_to_image(PROMPTS, steps=10, latents=z), expected)
    plain = pipe.text_to_image(PROMPTS, steps=10, latents=z)
    assert np.abs(np.clip(plain / 2 + 0.5, 0, 1) - expected).max() > 1e-2


def test_a_word_of_textual_inversion(tmp_path):
    theirs = stable_diffusion(tmp_path)
    pipe = ldm_jax.from_pretrained(tmp_path / "theirs")
    vectors = torch.from_numpy(random(2, 32, seed=4))
    torch.save({"string_to_param": {"*": vectors}, "name": "thing"}, tmp_path / "thing.pt")
    files.write(tmp_path / "thing.safetensors", {"<thing>": vectors.numpy()})
    theirs.load_textual_inversion(tmp_path / "thing.safetensors", token="<thing>")
    prompts, z = ["a <thing> on a mat", "a cat"], random(2, 8, 8, 4)
    expected = theirs(
        prompts, num_inference_steps=10, latents=first(z), height=16, width=16, output_type="np"
    ).images
    for path in ("thing.safetensors", "thing.pt"):
        knows = pipe.with_word(tmp_path / path, "<thing>")
        close(knows.text_to_image(prompts, steps=10, latents=z), expected)
    knows.save_pretrained(tmp_path / "ours")
    again = ldm_jax.from_pretrained(tmp_path / "ours")
    np.testing.assert_array_equal(again.tokenize(prompts), knows.tokenize(prompts))
    same(again.component_params(), knows.component_params())


def test_layers_of_the_text_encoder_left_out(tmp_path):
    theirs = stable_diffusion(tmp_path)
    pipe = ldm_jax.from_pretrained(tmp_path / "theirs").reading(clip_skip=1)
    ids = pipe.tokenize(PROMPTS)
    with torch.no_grad():
        states = theirs.text_encoder(torch.tensor(ids), output_hidden_states=True).hidden_states
        encoder = getattr(theirs.text_encoder, "text_model", theirs.text_encoder)
        skipped = encoder.final_layer_norm(states[-2])
    assert error(np.asarray(pipe.encode_text(PROMPTS).tokens), skipped.numpy()) < 1e-4


def test_long_and_weighted_prompts(tmp_path):
    theirs = stable_diffusion(tmp_path)
    pipe = ldm_jax.from_pretrained(tmp_path / "theirs")
    words = "red and blue houses by the sea, " * 12
    long = pipe.reading(chunks=None)
    ids = long.tokenize([words, "a cat"])
    assert ids.shape[0] == 2
    assert ids.shape[1] > 77
    assert ids.shape[1] % 77 == 0
    with torch.no_grad():
        pieces = [
            theirs.text_encoder(torch.tensor(x))[0] for x in np.split(ids, ids.shape[1] // 77, 1)
        ]
    expected = torch.cat(pieces, 1).numpy()
    assert error(np.asarray(long.encode_text([words, "a cat"]).tokens), expected) < 1e-4
    images = long.text_to_image([words, "a cat"], "a dog", steps=3)
    assert np.isfinite(images).all()
    heavy = pipe.reading(weighted=True)
    np.testing.assert_array_equal(heavy.tokenize("a (cat:1.3)"), pipe.tokenize("a cat"))
    plain, weighed = (
        np.asarray(p.encode_text(t).tokens) for p, t in ((pipe, "a cat"), (heavy, "a (cat:1.3)"))
    )
    assert np.abs(weighed - plain).max() > 1e-2
    np.testing.assert_allclose(weighed.mean(), plain.mean(), atol=1e-5)


def test_noise_of_every_step_can_be_given(tmp_path):
    theirs = stable_diffusion(tmp_path)
    pipe = ldm_jax.from_pretrained(tmp_path / "theirs")
    z, steps = random(2, 8, 8, 4), 10
    generator = torch.Generator().manual_seed(3)
    noises = torch.stack([torch.randn(2, 4, 8, 8, generator=generator) for _ in range(steps)])
    expected = theirs(
        PROMPTS,
        num_inference_steps=steps,
        latents=first(z),
        height=16,
        width=16,
        eta=1.0,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
    ).images
    noises = noises.permute(0, 1, 3, 4, 2).numpy()
    given = dict(steps=steps, latents=z, eta=1.0, noises=noises)
    close(pipe.text_to_image(PROMPTS, **given), expected)
    with pytest.raises(ValueError, match=r"noises of shape \(9, 2, 8, 8, 4\) were given"):
        pipe.text_to_image(PROMPTS, **given | dict(noises=noises[1:]))
    with pytest.raises(ValueError, match="is for the solver ddim"):
        pipe.text_to_image(PROMPTS, **given, solver="euler")
