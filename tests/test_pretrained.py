"""Pretrained models from reduced folders of our own: what they promise users (parity is in tests/parity)."""

import json
import logging
import shutil

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from ldm_jax import tree
from ldm_jax.pretrained import Pretrained, from_pretrained, sampling
from ldm_jax.pretrained.inputs import Hint
from ldm_jax.training import sharding
from ldm_jax.weights import files
from tests import pretrained_folder as reduced

PROMPTS = ["a cat on a mat", "red, and Blue!"]
STEPS = 3


def one_device():
    return sharding.make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return reduced.write(tmp_path_factory.mktemp("reduced") / "sd")


@pytest.fixture(scope="module")
def pipe(folder):
    return from_pretrained(folder, mesh=one_device())


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Models for other verbs, by name."""
    root = tmp_path_factory.mktemp("others")
    low = dict(_class_name="DDPMScheduler", beta_schedule="squaredcos_cap_v2")
    written = {
        "inpaint": reduced.write(root / "inpaint", in_channels=9),
        "instruct": reduced.write(root / "instruct", in_channels=8),
        "depth": reduced.write(root / "depth", in_channels=5),
        "upscale": reduced.write(
            root / "upscale", in_channels=7, num_class_embeds=1000, low_res=low
        ),
    }
    return {name: from_pretrained(path, mesh=one_device()) for name, path in written.items()}


@pytest.fixture
def copy(folder, tmp_path):
    """A folder that a test may spoil."""
    return shutil.copytree(folder, tmp_path / "copy")


def pictures(n=2, side=16, channels=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform(-1, 1, (n, side, side, channels)).astype(np.float32)


def test_text_to_image(pipe):
    images = pipe.text_to_image(PROMPTS, steps=STEPS)
    assert isinstance(pipe, Pretrained)
    assert images.shape == (2, 16, 16, 3)
    assert images.dtype == np.float32
    assert np.isfinite(images).all()
    assert images.std() > 0.1
    np.testing.assert_array_equal(pipe.text_to_image(PROMPTS, steps=STEPS), images)
    moved = pipe.text_to_image(PROMPTS, steps=STEPS, seed=1)
    assert np.abs(moved - images).max() > 0.1
    # A picture follows from its prompt and its seed, whatever else is drawn with it.
    other = pipe.text_to_image([PROMPTS[1], PROMPTS[1]], steps=STEPS)
    np.testing.assert_allclose(other[1], images[1], rtol=1e-4, atol=1e-4)
    assert np.abs(other[0] - images[0]).max() > 0.01
    # Given latents are what the seed would have drawn.
    z = jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), (8, 8, 4)))(jnp.arange(2))
    given = pipe.text_to_image(PROMPTS, steps=STEPS, latents=z)
    np.testing.assert_allclose(given, images, rtol=1e-4, atol=1e-4)
    assert pipe.text_to_image("one", steps=STEPS).shape == (1, 16, 16, 3)


def test_encoding_and_prediction_have_their_shapes(pipe):
    z = pipe.encode(pictures())
    assert z.shape == (2, 8, 8, 4)
    assert pipe.decode(z).shape == (2, 16, 16, 3)
    cond = pipe.encode_text(PROMPTS)
    assert cond.tokens.shape == (2, 77, 32)
    assert pipe.tokenize(PROMPTS).shape == (2, 77)
    out = pipe.predict(z, 500, cond)
    assert out.shape == (2, 8, 8, 4)
    np.testing.assert_allclose(pipe.predict(z, [500, 500], cond), out, rtol=1e-5, atol=1e-6)
    assert np.abs(pipe.predict(z, [500, 20], cond)[1] - out[1]).max() > 1e-3


def compiled(caplog, run):
    """The names of what is compiled in a run."""
    caplog.clear()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        run()
    found = [r.getMessage() for r in caplog.records]
    return [m.split()[4] for m in found if m.startswith("Finished XLA compilation of")]


def test_values_do_not_compile_anew_and_shapes_do(pipe, caplog):
    x = pictures()

    def text(prompts=PROMPTS, negative="bad", seed=3, guidance=4.0, steps=4):
        pipe.text_to_image(prompts, negative, seed=seed, guidance=guidance, steps=steps)

    def image(strength=0.5, seed=0, guidance=7.5, steps=4):
        pipe.image_to_image(
            PROMPTS, x, "bad", strength=strength, seed=seed, guidance=guidance, steps=steps
        )

    assert "jit(draw)" in compiled(caplog, text)
    image()
    assert compiled(caplog, lambda: text(["", "of other words"], "worse", 7, 1.5)) == []
    assert compiled(caplog, lambda: image(0.8, 1, 2.0)) == []
    assert "jit(draw)" in compiled(caplog, lambda: text(steps=5))
    assert "jit(draw)" in compiled(caplog, lambda: text(PROMPTS[:1]))


def test_a_model_of_the_same_structure_is_not_compiled_anew(pipe, folder, tmp_path, caplog):
    tuned = shutil.copytree(folder, tmp_path / "tuned")
    reduced.component(tuned / "unet", "UNet2DConditionModel", reduced.UNET, seed=9)
    images = pipe.text_to_image(PROMPTS, steps=STEPS)
    again = from_pretrained(tuned, mesh=one_device())
    drawn = []
    names = compiled(caplog, lambda: drawn.append(again.text_to_image(PROMPTS, steps=STEPS)))
    assert "jit(draw)" not in names
    assert np.abs(drawn[0] - images).max() > 0.1


def test_strength(pipe):
    """The steps that are left out ask no network: the result is that of the shorter walk by hand."""
    x, z = pictures(), np.random.default_rng(1).standard_normal((2, 8, 8, 4)).astype(np.float32)

    def draw(strength):
        return pipe.image_to_image(PROMPTS, x, strength=strength, steps=4, guidance=1.0, latents=z)

    at = sampling.samplers.grid(pipe.model.path, 4, "leading", to_zero=False)
    cond = pipe.encode_text(PROMPTS)
    walk = at.alpha[2] * pipe.encode(x) + at.sigma[2] * z
    for i in (2, 3):
        eps = pipe.predict(walk, float(at.t[i] * 999), cond)
        x0 = (walk - at.sigma[i] * eps) / at.alpha[i]
        walk = at.alpha[i + 1] * x0 + at.sigma[i + 1] * eps
    np.testing.assert_allclose(draw(0.5), pipe.decode(walk), rtol=1e-3, atol=1e-3)
    assert np.abs(draw(1.0) - draw(0.5)).max() > 0.1


@pytest.mark.parametrize("solver", ["heun", "dpmpp_2m"])
def test_solvers(solver, pipe):
    images = pipe.image_to_image(PROMPTS, pictures(), solver=solver, steps=4, strength=0.5)
    assert images.shape == (2, 16, 16, 3)
    assert np.isfinite(images).all()


@pytest.mark.slow
def test_verbs_of_other_models(others):
    x = pictures()
    masks = np.zeros((2, 16, 16), np.float32)
    masks[:, :8] = 1
    drawn = {
        "inpaint": others["inpaint"].inpaint(PROMPTS, x, masks, steps=STEPS),
        "instruct": others["instruct"].instruct(PROMPTS, x, steps=STEPS),
        "depth": others["depth"].depth_to_image(PROMPTS, x, x[..., 0], steps=STEPS),
        "upscale": others["upscale"].upscale(PROMPTS, pictures(side=8), steps=STEPS),
    }
    for name, images in drawn.items():
        assert images.shape == (2, 16, 16, 3), name
        assert np.isfinite(images).all(), name
    # Each reads what it is given besides the prompt.
    moved = others["inpaint"].inpaint(PROMPTS, x, 1 - masks, steps=STEPS)
    assert np.abs(moved - drawn["inpaint"]).max() > 0.01
    moved = others["instruct"].instruct(PROMPTS, x, steps=STEPS, image_guidance=3.0)
    assert np.abs(moved - drawn["instruct"]).max() > 0.01
    moved = others["upscale"].upscale(PROMPTS, pictures(side=8), steps=STEPS, noise_level=300)
    assert np.abs(moved - drawn["upscale"]).max() > 0.01


def test_xl(tmp_path):
    pipe = from_pretrained(reduced.write(tmp_path / "xl", xl=True), mesh=one_device())
    assert [ids.shape for ids in pipe.tokenize(PROMPTS)] == [(2, 77)] * 2
    images = pipe.text_to_image(PROMPTS, steps=STEPS)
    assert images.shape == (2, 16, 16, 3)
    assert np.isfinite(images).all()
    small = pipe.text_to_image(PROMPTS, steps=STEPS, original_size=(8, 8), crop=(4, 0))
    assert np.abs(small - images).max() > 1e-3
    with pytest.raises(ValueError, match="3 prompts and 2 negative prompts"):
        pipe.text_to_image(["a", "b", "c"], PROMPTS)


def test_a_controlnet(folder, tmp_path, pipe):
    reduced.component(tmp_path / "canny", "ControlNetModel", reduced.CONTROL, 7)
    steered = from_pretrained(folder, controlnets=[tmp_path / "canny"], mesh=one_device())
    hint = Hint(pictures() / 2 + 0.5)
    images = steered.text_to_image(PROMPTS, steps=STEPS, hints=[hint])
    assert np.abs(images - pipe.text_to_image(PROMPTS, steps=STEPS)).max() > 0.01
    off = steered.text_to_image(PROMPTS, steps=STEPS, hints=[hint._replace(scale=0.0)])
    np.testing.assert_allclose(off, pipe.text_to_image(PROMPTS, steps=STEPS), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="0 hints for 1 ControlNets"):
        steered.text_to_image(PROMPTS)
    with pytest.raises(ValueError, match=r"does not fit 2 images of \(16, 16\)"):
        steered.text_to_image(PROMPTS, hints=[Hint(pictures(side=8))])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_types_of_parameters(dtype, folder, pipe):
    narrow = from_pretrained(folder, dtype=dtype, mesh=one_device())
    assert {leaf.dtype for leaf in jax.tree.leaves(narrow.params)} == {jnp.dtype(dtype)}
    images = narrow.text_to_image(PROMPTS, steps=STEPS)
    assert images.dtype == np.float32
    wide = pipe.text_to_image(PROMPTS, steps=STEPS)
    assert 1e-5 < np.abs(images - wide).max() / np.abs(wide).max() < 0.25
    assert from_pretrained(folder, dtype=jnp.dtype(dtype), mesh=one_device()).model == narrow.model


def test_sharded_as_on_one_device(folder, pipe):
    mesh = sharding.make_mesh(data=1, fsdp=8)
    spread = from_pretrained(folder, mesh=mesh, rules=((".*", "fsdp"),))
    leaves = zip(
        tree.names(spread.params),
        jax.tree.leaves(spread.params),
        jax.tree.leaves(pipe.params),
        strict=True,
    )
    large = 0
    for name, leaf, whole in leaves:
        np.testing.assert_array_equal(leaf, whole)
        assert len(leaf.sharding.device_set) == 8, name
        if leaf.size >= sharding.FSDP_MIN_SIZE:
            large += 1
            assert all(s.data.size * 8 == leaf.size for s in leaf.addressable_shards), name
    assert large > 1
    images = spread.text_to_image(PROMPTS, steps=STEPS)
    np.testing.assert_allclose(
        images, pipe.text_to_image(PROMPTS, steps=STEPS), rtol=1e-4, atol=1e-4
    )


def test_saved_and_loaded_again(folder, pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "saved")
    names = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    saved = tmp_path / "saved"
    assert sorted(p.relative_to(saved) for p in saved.rglob("*") if p.is_file()) == names
    for name in names:
        ours, theirs = saved / name, folder / name
        if name.suffix == ".safetensors":
            ours, theirs = files.read(ours), files.read(theirs)
            assert ours.keys() == theirs.keys()
            for key, tensor in theirs.items():
                assert np.asarray(ours[key]).tobytes() == np.asarray(tensor).tobytes(), key
        elif name.suffix == ".json":
            config = json.loads(theirs.read_text())
            if name.parts[0] == "text_encoder":  # which this folder leaves to the index
                config = {"architectures": ["CLIPTextModel"]} | config
            assert json.loads(ours.read_text()) == config, name
        else:
            assert ours.read_bytes() == theirs.read_bytes(), name
    again = from_pretrained(saved, mesh=one_device())
    assert again.model == pipe.model
    for ours, before in zip(*map(jax.tree.leaves, (again.params, pipe.params)), strict=True):
        assert ours.tobytes() == before.tobytes()
    with pytest.raises(ValueError, match="exists and is not empty"):
        pipe.save_pretrained(saved)


def test_variants_and_sharded_files(copy, pipe):
    for name in ("unet", "vae", "text_encoder"):
        (file,) = (copy / name).glob("*.safetensors")
        file.rename(file.with_suffix(".fp16.safetensors"))
    found = from_pretrained(copy, variant="fp16", mesh=one_device())
    kernel = found.params["network"]["conv_in"]["kernel"]
    np.testing.assert_array_equal(kernel, pipe.params["network"]["conv_in"]["kernel"])
    with pytest.raises(FileNotFoundError, match=r"fp16.safetensors.*give another `variant`"):
        from_pretrained(copy)
    stem = "diffusion_pytorch_model"
    whole = copy / "unet" / f"{stem}.fp16.safetensors"
    tensors = {name: np.asarray(tensor) for name, tensor in files.read(whole).items()}
    parts = [f"{stem}.fp16-{i:05}-of-00002.safetensors" for i in (1, 2)]
    places = {name: parts[i % 2] for i, name in enumerate(tensors)}
    for part in parts:
        files.write(copy / "unet" / part, {n: t for n, t in tensors.items() if places[n] == part})
    reduced.put(copy / "unet" / f"{stem}.safetensors.index.fp16.json", dict(weight_map=places))
    whole.unlink()
    found = from_pretrained(copy, variant="fp16", mesh=one_device())
    for ours, before in zip(*map(jax.tree.leaves, (found.params, pipe.params)), strict=True):
        np.testing.assert_array_equal(ours, before)


X, MASKS = pictures(), np.zeros((2, 16, 16), np.float32)
# name: model, verb, arguments, what the error says
WRONG = {
    "a side that the factor does not divide": (
        "text",
        "text_to_image",
        (PROMPTS,),
        dict(height=17),
        "factor 2 must divide both",
    ),
    "an image that the factor does not divide": (
        "text",
        "image_to_image",
        (PROMPTS, X[:, :15]),
        {},
        r"shape \(2, 15, 16, 3\)",
    ),
    "channels of images": (
        "text",
        "image_to_image",
        (PROMPTS, X[..., :1]),
        {},
        r"give \[b, h, w, 3\]",
    ),
    "images without a batch": (
        "text",
        "image_to_image",
        (PROMPTS, X[0]),
        {},
        r"give \[b, h, w, 3\]",
    ),
    "prompts and images": ("text", "image_to_image", (["one"], X), {}, "1 prompts and 2 images"),
    "prompts and negative prompts": (
        "text",
        "text_to_image",
        (["a", "b", "c"], PROMPTS),
        {},
        "3 prompts and 2 negative prompts",
    ),
    "strength": ("text", "image_to_image", (PROMPTS, X), dict(strength=1.5), r"in \(0, 1\]"),
    "latents": (
        "text",
        "text_to_image",
        (PROMPTS,),
        dict(latents=np.zeros((2, 8, 8, 3), np.float32)),
        r"\(2, 8, 8, 4\) is needed",
    ),
    "latents without a batch": (
        "text",
        "text_to_image",
        (PROMPTS,),
        dict(latents=np.zeros((8, 8, 4), np.float32)),
        r"\(2, 8, 8, 4\) is needed",
    ),
    "a solver": ("text", "text_to_image", (PROMPTS,), dict(solver="ode"), "no solver 'ode'"),
    "steps": ("text", "text_to_image", (PROMPTS,), dict(steps=0), "at least one step"),
    "no prompts": ("text", "text_to_image", ([],), {}, "at least one prompt"),
    "a size": ("text", "text_to_image", (PROMPTS,), dict(crop=(0, 8)), "reads no sizes"),
    "another verb": ("text", "instruct", (PROMPTS, X), {}, "it is a model for text_to_image"),
    "another model": ("inpaint", "text_to_image", (PROMPTS,), {}, "it is a model for inpaint"),
    "masks": ("inpaint", "inpaint", (PROMPTS, X, MASKS[:, :8]), {}, r"masks of shape \(2, 8, 16\)"),
    "images to inpaint": ("inpaint", "inpaint", (["one"], X, MASKS), {}, "1 prompts and 2 images"),
    "a solver of inpainting": (
        "inpaint",
        "inpaint",
        (PROMPTS, X, MASKS),
        dict(solver="ode"),
        "no solver 'ode'",
    ),
    "images to edit": ("instruct", "instruct", (["one"], X), {}, "1 prompts and 2 images"),
    "depth maps": (
        "depth",
        "depth_to_image",
        (PROMPTS, X, MASKS[:1]),
        {},
        "2 prompts and 1 depth maps",
    ),
    "the level of noise": (
        "upscale",
        "upscale",
        (PROMPTS, X),
        dict(noise_level=400),
        "outside of 0 to 350",
    ),
    "eta of another solver": (
        "text",
        "image_to_image",
        (PROMPTS, X),
        dict(eta=1.0, solver="euler"),
        "is for the solver ddim",
    ),
    "the noise of other steps": (
        "text",
        "image_to_image",
        (PROMPTS, X),
        dict(steps=3, noises=np.zeros((2, 2, 8, 8, 4), np.float32)),
        r"\(3, 2, 8, 8, 4\) is needed",
    ),
    "the noise of small images": (
        "upscale",
        "upscale",
        (PROMPTS, X),
        dict(noise=X[:1]),
        r"noise of shape \(1, 16, 16, 3\) was given",
    ),
    "images to upscale": ("upscale", "upscale", (PROMPTS, X[..., :2]), {}, r"give \[b, h, w, 3\]"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_inputs_are_told_before_any_compile(what, pipe, others, caplog, monkeypatch):
    # As outside of pytest, where annotations are not checked.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    model, verb, args, kwargs, says = WRONG[what]
    model = pipe if model == "text" else others[model]

    def run():
        with pytest.raises(ValueError, match=says) as told:
            getattr(model, verb)(*args, **kwargs)
        assert "\n" not in str(told.value)

    big = {"jit(draw)", "jit(encode)", "jit(decode)", "jit(condition)"}
    assert not big & set(compiled(caplog, run))
