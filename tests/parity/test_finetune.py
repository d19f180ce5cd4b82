"""The first loss and gradient of a run that starts from a folder of diffusers, against diffusers' own training."""

import importlib

import jax
import numpy as np
import pytest

from ldm_jax import build, conditioners
from ldm_jax.build import pretrained
from ldm_jax.training import sharding
from tests import clip_files, tiny
from tests.parity import pipelines as theirs

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

BATCH, DROP = 8, 0.4


def run_of(folder, name, tmp_path, **init):
    """The run of a config on small pictures, and the first batch."""
    config = importlib.import_module(f"configs.{name}").get_config()
    config.init.update(path=str(folder), dtype="float32", **init)
    config.data.update(batch=BATCH, size=16, workers=0)
    config.data.source.update(path=str(tiny.pictures(tmp_path / "pictures", size=24)), split="all")
    config.data.validation = dict(split="all")
    config.objective.drop = DROP
    config.log = dict(batches=1, samples=1)
    run = build.run(config, tmp_path / "run")
    return config, run, next(run.batches(0))


def ours(config, run, batch, rng):
    """Loss, and the gradient of each network that is trained under diffusers' names."""
    shapes = jax.eval_shape(run.init, rng)
    params = run.load(sharding.layouts(run.mesh, run.rules, shapes))
    step = jax.jit(jax.value_and_grad(run.loss, has_aux=True))
    placed = sharding.place(run.mesh, batch)
    (value, _), gradient = step(params, run.frozen, placed, rng, 0)
    of = pretrained.opened(config)
    found = {"unet": gradient["network"]}
    found |= {of.encoders[key]: tree for key, tree in gradient.get("conditioner", {}).items()}
    return float(value), {name: of.components[name].export(tree) for name, tree in found.items()}


def drawn(rng, batch, shape):
    """What our loss draws from its key: posterior's noise, dropped rows, timesteps, noise."""
    for_codec, for_drop, for_noise, _ = jax.random.split(rng, 4)
    of_t, of_eps, _ = jax.random.split(for_noise, 3)
    dropped = conditioners.draw_drops(for_drop, ("tokens",), DROP, batch)["tokens"]
    t = jax.random.randint(of_t, (batch,), 0, 1000)
    noise = [theirs.first(jax.random.normal(key, shape)) for key in (for_codec, of_eps)]
    return noise[0], torch.tensor(np.asarray(dropped)), torch.tensor(np.asarray(t)).long(), noise[1]


def reference(pipe, batch, draws, tokens, added=None):
    """diffusers' training step, as its text-to-image examples have it."""
    of_codec, _, t, eps = draws
    with torch.no_grad():
        posterior = pipe.vae.encode(theirs.first(batch["x"])).latent_dist
        z = (posterior.mean + posterior.std * of_codec) * pipe.vae.config.scaling_factor
    scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    noisy = scheduler.add_noise(z, eps, t)
    kind = scheduler.config.prediction_type
    target = eps if kind == "epsilon" else scheduler.get_velocity(z, eps, t)
    out = pipe.unet(noisy, t, tokens, added_cond_kwargs=added).sample
    loss = torch.nn.functional.mse_loss(out, target)
    loss.backward()
    trained = {"unet": pipe.unet}
    if tokens.requires_grad:
        trained["text_encoder"] = pipe.text_encoder
    return loss.item(), {
        of: {name: p.grad.numpy() for name, p in network.named_parameters()}
        for of, network in trained.items()
    }


def assert_same(ours, theirs):
    (loss, gradient), (expected, expected_gradient) = ours, theirs
    assert abs(loss - expected) < 1e-5 * expected
    assert gradient.keys() == expected_gradient.keys()
    for network, wanted in expected_gradient.items():
        # transformers 5 has no "text_model." before the names of this class, and its files have.
        found = {name.removeprefix("text_model."): g for name, g in gradient[network].items()}
        wanted = {name.removeprefix("text_model."): g for name, g in wanted.items()}
        assert found.keys() == wanted.keys()
        for name, g in wanted.items():
            if name.endswith("k_proj.bias"):  # attention does not see it: all but rounding is zero
                assert np.linalg.norm(g) + np.linalg.norm(found[name]) < 1e-6, name
                continue
            assert np.linalg.norm(found[name] - g) < 1e-4 * np.linalg.norm(g), name


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_first_step_is_diffusers(prediction, tmp_path):
    pipe = theirs.stable_diffusion(tmp_path, prediction_type=prediction)
    with_text = prediction == "v_prediction"  # then the text encoder is trained, too
    config, run, batch = run_of(
        tmp_path / "theirs", "sd15_finetune", tmp_path, train_text_encoder=with_text
    )
    rng = jax.random.key(3)
    draws = drawn(rng, BATCH, (BATCH, 8, 8, 4))
    dropped = draws[1]
    assert 0 < dropped.sum() < BATCH
    words = dict(padding="max_length", truncation=True, max_length=77, return_tensors="pt")
    null = pipe.tokenizer("", **words).input_ids
    ids = torch.where(dropped[:, None], null, torch.tensor(batch["tokens"]).long())
    with torch.set_grad_enabled(with_text):
        tokens = pipe.text_encoder(ids)[0]
    assert_same(ours(config, run, batch, rng), reference(pipe, batch, draws, tokens))


def xl(tmp_path):
    words = [
        theirs.tokenizer(tmp_path / f"words_{i}", pad)
        for i, pad in enumerate([clip_files.END, "!"])
    ]
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=theirs.vae(scaling_factor=0.13025, force_upcast=True),
        text_encoder=theirs.text_encoder(len(words[0])),
        text_encoder_2=theirs.text_encoder(len(words[1]), 24, "gelu", projection=20),
        tokenizer=words[0],
        tokenizer_2=words[1],
        unet=theirs.unet(
            cross=32 + 24,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=6 * 256 + 20,
            transformer_layers_per_block=[1, 2],
            use_linear_projection=True,
        ),
        scheduler=diffusers.DDIMScheduler(**theirs.NOISE),
    )
    pipe.save_pretrained(tmp_path / "theirs")
    return pipe


def test_the_first_step_of_xl_is_diffusers(tmp_path):
    pipe = xl(tmp_path)
    config, run, batch = run_of(tmp_path / "theirs", "sdxl_finetune", tmp_path)
    assert batch["sizes"].tolist() == [[24, 24, 0, 0, 16, 16]] * BATCH
    batch["sizes"] += np.random.default_rng(0).integers(0, 99, batch["sizes"].shape)
    rng = jax.random.key(3)
    draws = drawn(rng, BATCH, (BATCH, 8, 8, 4))
    kept = ~draws[1]
    ids = [torch.tensor(batch[field]).long() for field in ("tokens", "tokens_2")]
    with torch.no_grad():
        states = [
            encoder(i, output_hidden_states=True)
            for encoder, i in zip([pipe.text_encoder, pipe.text_encoder_2], ids, strict=True)
        ]
    # A caption that is dropped is zeros here: `force_zeros_for_empty_prompt` of the pipeline.
    tokens = torch.cat([s.hidden_states[-2] for s in states], -1) * kept[:, None, None]
    pooled = states[1].text_embeds * kept[:, None]
    added = dict(text_embeds=pooled, time_ids=torch.tensor(batch["sizes"]))
    assert_same(ours(config, run, batch, rng), reference(pipe, batch, draws, tokens, added))
