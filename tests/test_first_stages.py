"""Runs of autoencoders: what a config may say, codes, the perceptual term, starting from another run, frozen parts."""

import functools
import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import build, cache, flops, tree
from ldm_jax.build import autoencoder, diffusion, encoding, parts
from ldm_jax.data import latents
from ldm_jax.training import checkpoints, loop, sharding, step
from ldm_jax.weights import features, files, lpips, table
from tests import tiny
from tests.drawn import like
from tests.tiny import assert_equal, quick_compiles  # noqa: F401 (a fixture of this module)


def config_of(kind="vq", **changes):
    config = tiny.config_of(kind)
    for name, value in changes.items():
        *path, last = name.split("__")
        functools.reduce(lambda c, k: c[k], path, config)[last] = value
    return config


def without(config, *names):
    for name in names:
        del config[name]
    return config


@pytest.mark.parametrize(
    ("kind", "changes", "told"),
    [
        (
            "vq",
            dict(objective__normalization="summ"),
            "objective.normalization = 'summ' is unknown; did you mean 'sum'",
        ),
        ("vq", dict(objective__kl_weight=1.0), "objective.kl_weight is unknown for vq.VQAutoenc"),
        ("autoencoder", dict(objective__beta=1.0), "beta is unknown for autoencoder.KLAutoencoder"),
        (
            "autoencoder",
            dict(codebook=dict(name="average")),
            "autoencoder.KLAutoencoder has no codebook; leave the section codebook out, or take",
        ),
        ("autoencoder", dict(model__codes=16), "autoencoder.KLAutoencoder takes no 'codes'"),
        (
            "vq",
            dict(model__levels=(4, 4)),
            "vq.VQAutoencoder with levels has no codebook; leave the section codebook out",
        ),
        ("vq", dict(codebook=dict(name="avrage")), "did you mean 'average'"),
        (
            "vq",
            dict(optimizer__frozen=("gen/encoder/.*", "gen/codebook")),
            "codebook says how 'gen/codebook' learns, and optimizer.frozen that it does not",
        ),
        ("vq", dict(optimizer__frozen=("gen/enc/.*",)), "match no leaf"),
        ("autoencoder", dict(optimizer__frozen=(".*/.*",)), "leaves nothing to train"),
        ("vq", dict(start=dict(run="nowhere")), "nowhere holds no run"),
    ],
)
def test_what_does_not_fit_is_told_in_one_sentence(kind, changes, told, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=told):
        build.run(config_of(kind, **changes), tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_a_run_starts_from_a_run_of_the_same_autoencoder_only(tmp_path):
    start = dict(run=str(tiny.shared_autoencoder("vq")))
    for kind, changes, told in (
        ("autoencoder", {}, "has other parameters than config.model"),
        ("vq", dict(model__codes=17), "has other parameters than config.model"),
    ):
        with pytest.raises(ValueError, match=told):
            build.run(config_of(kind, start=start, **changes), tmp_path)
    start = dict(run=str(tiny.shared_model("pixels")))
    with pytest.raises(ValueError, match="is not the run of an autoencoder"):
        build.run(config_of(start=start), tmp_path)


# ---- frozen parts --------------------------------------------------------------------------------

ENCODER = ("gen/encoder/.*", "gen/quant_conv/.*", "gen/codebook")


@pytest.mark.parametrize("judged", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_new_decoder_for_an_encoder_that_keeps_its_bits(judged, tmp_path):
    """From another run's average; the encoder and the codebook keep every bit, in the average too."""
    config = config_of(
        start=dict(run=str(tiny.shared_autoencoder("vq"))),
        optimizer__frozen=ENCODER,
        optimizer__weight_decay=0.1,
        discriminator__width=4,  # another one than there: it starts afresh
    )
    idle = ("codebook",) if judged else ("codebook", "discriminator")
    run = build.run(without(config, *idle), tmp_path)
    mesh = sharding.make_mesh(data=1, devices=jax.devices()[:1])
    theirs, _ = checkpoints.load_ema(
        tiny.shared_autoencoder("vq"),
        shapes := jax.eval_shape(functools.partial(autoencoder.init, tiny.config_of("vq")), KEY),
        jax.tree.map(lambda _: sharding.replicated(mesh), shapes),
    )
    layouts = sharding.layouts(run.mesh, run.rules, jax.eval_shape(run.init, KEY))
    params = run.load(layouts)
    assert_equal(params["gen"], theirs["gen"])
    assert ("disc" in params) == judged
    if judged:
        assert params["disc"]["conv_0"]["kernel"].shape[-1] == 4
    train_step = jax.jit(step.make_train_step(run.loss, run.optimizer, run.ema))
    state = step.init_state(params, run.optimizer)
    rows = sharding.place(run.mesh, next(run.batches(0)))
    for _ in range(2):
        state, metrics = train_step(state, run.frozen, rows, KEY)
    assert float(metrics["skipped"]) == 0
    assert (float(metrics.get("disc_weight", 0)) > 0) == judged
    for name, now, average, before in zip(
        tree.names(params), *map(jax.tree.leaves, (state.params, state.ema, params)), strict=True
    ):
        if name == "disc/conv_out/bias":
            continue  # real and fake pictures pull it equally while both lie within the hinge
        still = name.startswith(("gen/encoder", "gen/quant_conv", "gen/codebook"))
        assert np.array_equal(now, before) == still, name
        assert np.array_equal(average, before) == still, name
    moments = [n for n in tree.names(state.opt_state) if "encoder" in n or "codebook" in n]
    assert not moments


KEY = jax.random.key(0)


def test_no_gradient_of_what_is_frozen_is_computed():
    """The backward pass does not enter the encoder, whose two gradients of each layer are then not there."""

    def operations(frozen):
        config = without(config_of(optimizer__frozen=frozen), "codebook", "discriminator")
        loss, _ = autoencoder.loss(config)
        params = {
            "gen": like(jax.eval_shape(functools.partial(autoencoder.init, config), KEY))["gen"]
        }
        rows = {"x": jnp.zeros((2, 16, 16, 3))}
        return flops.flops(jax.grad(lambda p: loss(p, {}, rows, KEY, 0)[0]), params)

    assert operations(ENCODER) < 0.85 * operations(("gen/codebook",))


# ---- the perceptual term -------------------------------------------------------------------------


@functools.cache
def lpips_file():
    """A file of LPIPS with both of its parts, of random numbers."""
    path = tiny.scratch() / "lpips.safetensors"
    variables = like(lpips.shapes())
    rows = features.lpips_table(["net.slice1.0.weight"])
    files.write(path, table.export(rows, variables))
    return path, variables


def perceptual(file):
    return config_of(perceptual=dict(name="lpips.LPIPS", weight=0.5, file=str(file)))


def test_without_weights_the_perceptual_term_is_off_and_says_so(caplog):
    _, arrays = autoencoder.loss(perceptual(""))
    lines = [r.getMessage() for r in caplog.records]
    assert lines == [
        "the perceptual term is off: perceptual.file names no weights of LPIPS; see docs/guide.md"
    ]
    assert arrays() == {}


def test_the_perceptual_term_is_lpips_with_the_weights_of_the_file():
    path, variables = lpips_file()
    config = without(perceptual(path), "discriminator", "codebook")
    (with_term, make_arrays), (plain, _) = (
        autoencoder.loss(c) for c in (config, without(perceptual(""), "discriminator", "codebook"))
    )
    arrays = make_arrays()
    assert_equal(arrays, variables)
    params = {"gen": like(jax.eval_shape(functools.partial(autoencoder.init, config), KEY))["gen"]}
    x = jax.random.uniform(KEY, (2, 16, 16, 3), minval=-1)
    more, less = (f(params, arrays, {"x": x}, KEY, 0)[0] for f in (with_term, plain))
    y, _ = autoencoder.model(config).apply({"params": params["gen"]}, x)
    expected = 0.5 * lpips.LPIPS().apply(variables, x, y).mean()
    np.testing.assert_allclose(more - less, expected, rtol=1e-3)
    assert abs(float(expected)) > 1e-3


def test_weights_of_another_network_are_refused(tmp_path):
    files.write(tmp_path / "other.safetensors", {"conv.weight": np.ones((3, 3), np.float32)})
    _, load = autoencoder.loss(perceptual(tmp_path / "other.safetensors"))
    with pytest.raises(ValueError, match="not the trunk and the weights of LPIPS on VGG16"):
        load()
    _, load = autoencoder.loss(perceptual(tmp_path / "absent.safetensors"))
    with pytest.raises(FileNotFoundError, match=r"absent\.safetensors"):
        load()
    config = perceptual(lpips_file()[0])
    config.data.size = 8
    with pytest.raises(ValueError, match="LPIPS needs pictures of at least 16 pixels a side"):
        autoencoder.loss(config)


# ---- the second stage ----------------------------------------------------------------------------


def test_a_cache_of_a_vq_autoencoder_holds_its_latents_before_quantisation(tmp_path):
    config = tiny.config_of("unconditional")
    config.codec.run = str(tiny.shared_autoencoder("vq"))
    job = encoding.job(config, tmp_path, "validation", 20, "float32", 16)
    cache.write(job, tmp_path, "validation")
    assert not job.plan.posterior
    assert job.plan.moments == (8, 8, 2)
    found = latents.cached(tmp_path, "validation")
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    coder, arrays, _ = diffusion.codec_of(config, mesh, None)
    of = autoencoder.model(tiny.config_of("vq"))
    x = jnp.asarray(parts.validation_batches(config, fields=())[0]["x"])
    variables = {"params": arrays["params"]}
    z = of.apply(variables, x, method="encode")
    np.testing.assert_allclose(
        np.stack([found[i]["moments"][0] for i in range(len(x))]), z, rtol=1e-4, atol=1e-5
    )
    entries = of.apply(variables, of.apply(variables, z, method="quantize")[1], method="lookup")
    assert np.abs(np.asarray(entries - z)).mean() > 0.01
    decoded = coder.decode(arrays, z)
    expected = of.apply(variables, entries, method="decode", quantized=True)
    np.testing.assert_allclose(decoded, expected, atol=1e-4)


@pytest.mark.slow
def test_both_stages_by_the_commands_that_a_user_types(tmp_path, capsys):
    """A VQ run, a cache of its latents, a model of them that is resumed, samples, and the latents' statistics."""
    vq, model, out = (str(tmp_path / name) for name in ("vq", "model", "cache"))
    assert tiny.call("train", *tiny.arguments("vq", vq)) == 0
    last = tiny.metrics(tmp_path / "vq")[-1]
    assert 0 < last["validation/usage"] <= 1
    assert 1 <= last["validation/perplexity"] <= 16
    line = tiny.losses(tmp_path / "vq")[-1]
    assert {"usage", "perplexity", "commitment", "discriminator"} < line.keys()
    given = [f"--config.codec.run={vq}", f"--config.data.cached={out}"]
    arguments = tiny.arguments("unconditional", model)
    of_cache = ["--out" if a == "--workdir" else out if a == model else a for a in arguments]
    assert tiny.call("ldm_jax/cache", *of_cache, given[0]) == 0
    assert tiny.call("train", *arguments, *given) == 0
    assert tiny.call("train", *arguments, *given, "--config.steps=6") == 0
    assert [line["step"] for line in tiny.losses(tmp_path / "model")] == [1, 2, 3, 4, 5, 6]
    assert tiny.call("sample", "--workdir", model, "--n", 2, "--steps", 2) == 0
    assert (tmp_path / "model/samples/00001.png").is_file()


@pytest.mark.slow
def test_a_run_of_codes_is_interrupted_and_goes_on_to_the_same_bits(tmp_path):
    """The codebook's statistics and its revivals are in the checkpoint."""
    states = []
    for name, stops in (("whole", (4,)), ("parts", (2, 4))):
        for steps in stops:
            config = config_of(steps=steps, log__save=100, log__evaluate=100)
            config.codebook.revive = 0.9
            workdir = tmp_path / name
            assert loop.train(build.run(config, workdir), workdir) == steps
        states.append(checkpoints_of(workdir, config))
    assert_equal(*states)
    own = states[0].opt_state["codebook"]
    assert len(np.unique(np.asarray(own["shares"]))) > 2
    assert tiny.losses(tmp_path / "whole") == tiny.losses(tmp_path / "parts")


def checkpoints_of(workdir, config):
    run = build.run(config, workdir)
    saved = checkpoints.Checkpoints(workdir)
    state, _ = loop.start_state(run, saved)
    saved.close()
    return state


# ---- statistics of latents -----------------------------------------------------------------------


def test_the_statistics_of_latents_are_those_of_numpy(tmp_path, capsys):
    workdir = tiny.shared_autoencoder("vq")
    out = tmp_path / "latents.json"
    argv = ["--workdir", workdir, "--n", 11, "--batch", 4, "--out", out]
    assert tiny.call("ldm_jax/latent_statistics", *argv) == 0
    found = json.loads(out.read_text())
    config = tiny.config_of("vq")
    source = parts.source(config, split="all")
    fixed = dict(crop="center", flip=False, shuffle=False, repeat=False)
    x = jnp.asarray(parts.batches(config, source, (), batch=11, **fixed)[0]["x"])
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    stage2 = tiny.config_of("unconditional")
    stage2.codec.run = str(workdir)
    _, arrays, _ = diffusion.codec_of(stage2, mesh, None)
    of = autoencoder.model(config)
    z = np.asarray(of.apply({"params": arrays["params"]}, x, method="encode"), np.float64)
    _, indices = of.apply(
        {"params": arrays["params"]}, jnp.asarray(z, jnp.float32), method="quantize"
    )
    np.testing.assert_allclose(found["channel_mean"], z.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found["channel_std"], z.std((0, 1, 2)), rtol=1e-4)
    np.testing.assert_allclose(found["std"], z.std(), rtol=1e-4)
    np.testing.assert_allclose(found["scale"], 1 / z.std(), rtol=1e-4)
    np.testing.assert_allclose(found["usage"], len(np.unique(indices)) / 16, rtol=1e-5)
    assert (found["pictures"], found["step"]) == (11, 0)
    told = capsys.readouterr().out.strip()
    assert told.startswith(f"scale {found['scale']:.5f} (mean")
    assert "of the codes used" in told


def test_statistics_are_asked_of_an_autoencoder_with_enough_pictures(capsys):
    for argv, told in (
        (("--workdir", tiny.shared_model("pixels")), "latents are those of an autoencoder"),
        (("--workdir", tiny.shared_autoencoder("vq"), "--n", 49), "has 48 examples, not 49"),
        (("--workdir", "nowhere"), "holds no run"),
    ):
        assert tiny.call("ldm_jax/latent_statistics", *argv) == 2
        assert told in capsys.readouterr().err


@pytest.mark.slow
def test_a_vq_gan_trains_and_uses_its_codes(tmp_path):
    """configs/demo_vq.py, narrower and for 200 steps, on coloured squares: no step is skipped, and no code is lost."""
    config = importlib.import_module("configs.demo_vq").get_config()
    folder = tiny.pictures(tmp_path / "pictures", n=64, size=32)
    config.data.source = dict(name="folder.folder", path=str(folder), split="train")
    config.data.validation = dict(split="all")
    config.model.update(width=8, codes=32)
    config.discriminator.width = 8
    config.steps, config.objective.disc_start = 200, 100
    config.log = dict(every=50, evaluate=100, save=200, batches=4, samples=4)
    assert loop.train(build.run(config, tmp_path / "run"), tmp_path / "run") == 200
    lines = tiny.metrics(tmp_path / "run")
    first, last = (line for line in lines if "validation/psnr" in line)
    assert last["validation/usage"] > 0.5
    assert last["validation/psnr"] > first["validation/psnr"] - 1
    assert last["validation/psnr"] > 14
    steps = [line for line in lines if "loss" in line]
    assert all(line["skipped"] == 0 and np.isfinite(line["loss"]) for line in steps)
    assert steps[0]["discriminator"] == 0 < steps[-1]["discriminator"]
    assert steps[-1]["disc_weight"] > 0
