"""Every file in configs/: it builds, its full-size model has the size that it states, and a small one takes a step."""

import functools
import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import build, codec
from ldm_jax.build import autoencoder, diffusion, pretrained, workdir
from ldm_jax.pretrained import start
from ldm_jax.training import sharding, step
from tests import model_folders, tiny
from tests.drawn import like
from tests.tiny import quick_compiles  # noqa: F401 (a fixture of this module)

NAMES = sorted(p.stem for p in (tiny.ROOT / "configs").glob("*.py") if p.stem != "__init__")
# Parameters of each part: CompVis' own, from the checkpoints that the docstrings name.
SIZES = {
    "kl_f4": {"gen": 55_312_063},
    "kl_f8": {"gen": 83_653_863},
    "kl_f16": {"gen": 69_610_963},
    "kl_f32": {"gen": 103_880_131},
    "vq_f4": {"gen": 55_322_782},
    "vq_f4_noattn": {"gen": 53_219_486},
    "vq_f8": {"gen": 67_717_295},
    "vq_f8_n256": {"gen": 67_652_783},
    "vq_f16": {"gen": 69_593_371},
    "celebahq_f4": {"network": 274_056_163},
    "ffhq_f4": {"network": 274_056_163},
    "bedrooms_f4": {"network": 274_056_163},
    "churches_f8": {"network": 294_966_916},
    "imagenet_f8": {"network": 394_984_196},
    "imagenet_f4": {"network": 400_920_579},
    "imagenet_f4_v": {"network": 400_920_579},
    "imagenet_f4_edm": {"network": 400_920_579},
    "imagenet_f4_flow": {"network": 400_920_579},
    # With 294,912 fixed positions, 675,129,632 in facebookresearch/DiT.
    "imagenet_dit": {"network": 673_681_568, "conditioner": 1_153_152},
    "text_to_image_f4": {"network": 403_623_939, "conditioner": 166_590_080},
    "text_to_image_f8": {"network": 872_300_484, "conditioner": 542_895_360},
    "inpainting_big": {"network": 387_245_827},
    "bsr_sr": {"network": 113_622_563},
    "semantic_256": {"network": 215_229_315},
    "semantic_512": {"network": 215_229_315},
    "retrieval_768": {"network": 1_335_480_400},
    "layout_openimages": {"network": 246_277_379, "conditioner": 54_656_000},
    "layout_coco": {"network": 246_277_379, "conditioner": 54_656_000},
    # Of diffusers' own models: see tests/published_unets.py and tests/test_clip.py.
    "sd15_finetune": {"network": 859_520_964, "conditioner": 123_060_480},
    "sd21_finetune": {"network": 865_910_724, "conditioner": 340_387_840},
    "sdxl_finetune": {"network": 2_567_463_684, "conditioner": 817_720_320},
}
# Of the first stage: by how much it is coarser, and its channels.
FACTORS = {name: (4, 4) for name in NAMES if name.startswith("demo")}
FACTORS |= {name: (4, 3) for name in NAMES if "_f4" in name and not name.startswith(("kl", "vq"))}
FACTORS |= dict.fromkeys(("churches_f8", "imagenet_f8", "text_to_image_f8", "imagenet_dit"), (8, 4))
FACTORS |= dict.fromkeys(("inpainting_big", "bsr_sr", "semantic_256", "semantic_512"), (4, 3))
FACTORS |= dict.fromkeys(("layout_openimages", "layout_coco"), (4, 3))
FACTORS["retrieval_768"] = (16, 16)


def config_of(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    config.lock()
    return config


def coder(name):
    """Stands in for the trained autoencoder: means over blocks, of the right factor and channels."""
    factor, channels = FACTORS[name]

    def encode(arrays, x, rng):
        b, h, w, _ = x.shape
        blocks = x.reshape(b, h // factor, factor, w // factor, factor, 3).mean((2, 4, 5))
        return jnp.repeat(blocks[..., None], channels, -1) * arrays["scale"]

    def decode(arrays, z):
        x = z.mean(-1, keepdims=True) / arrays["scale"]
        return jnp.repeat(x.repeat(factor, 1).repeat(factor, 2), 3, -1)

    def shape(data):
        return (*(n // factor for n in data[:-1]), channels)

    return codec.Codec(encode, decode, shape)


@pytest.fixture
def with_coder(monkeypatch):
    def use(name):
        made = (coder(name), {"scale": jnp.ones(())}, {"run": "stand-in", "step": 0})
        monkeypatch.setattr(diffusion, "codec_of", lambda config, mesh, directory: made)

    return use


def shapes_of(name, config, with_coder):
    key = jax.random.key(0)
    if "init" in config:
        return start.shapes(pretrained.opened(config))
    if workdir.check_config(config) == "autoencoder":
        return jax.eval_shape(functools.partial(autoencoder.init, config), key)
    with_coder(name)
    provided = dict(null=(2, 3)) | dict(config.get("tokenizer", {}))
    provided.pop("kind", None)
    of, _, _ = diffusion.model(config, sharding.make_mesh(), tiny.scratch(), provided)
    return jax.eval_shape(functools.partial(diffusion.init, config, of, provided), key)


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", SIZES)
def test_the_full_size_is_that_of_the_reference(name, with_coder, tmp_path):
    config = config_of(name)
    if "init" in config:
        kind = name.removesuffix("_finetune")
        config.init.path = str(model_folders.write(tmp_path, kind, reduced=False))
    shapes = shapes_of(name, config, with_coder)
    for part, size in SIZES[name].items():
        assert count(shapes[part]) == size
        assert f"{size:,}" in importlib.import_module(f"configs.{name}").__doc__
    mesh = sharding.make_mesh(fsdp=8, data=1)
    sharding.layouts(mesh, config.sharding, shapes)  # its rules fit its parameters


@pytest.mark.parametrize("name", NAMES)
def test_a_config_is_complete_and_locked(name):
    config = config_of(name)
    workdir.check_config(config)
    with pytest.raises((AttributeError, KeyError)):
        config.optimizer.lrr = 1.0
    doc = importlib.import_module(f"configs.{name}").__doc__
    assert f"python train.py --config configs/{name}.py --workdir" in doc


def smaller(name):
    """The same config on tiny pictures, with its coarsest level, narrow layers and a small batch."""
    config = config_of(name)
    if "init" in config:
        return model_folders.smaller(config, name.removesuffix("_finetune"))
    with config.unlocked(), config.ignore_type():
        labelled = config.get("conditioner", {}).get("name") == "Label"
        field = config.get("conditioner", {}).get("field")
        pictures = tiny.shared_classes() if labelled else tiny.shared_pictures()
        config.data.source = dict(name="folder.folder", path=str(pictures), split="train")
        config.data.validation = dict(split="all")
        if field == "segmentation":
            maps = str(tiny.shared_maps())
            config.data.source = dict(
                name="maps.folder", path=str(pictures), maps=maps, split="train"
            )
        if field == "neighbours":
            index = str(tiny.shared_index())
            config.data.source = dict(
                name="neighbours.folder", path=str(pictures), index=index, neighbours=2
            )
            config.conditioner.update(count=2, width=4)
        if field == "layout":
            boxes = str(tiny.shared_boxes())
            config.data.source = dict(name="open_images.open_images", path=boxes, fewest=1)
            config.data.validation = dict(split="validation")
            config.data.layout.update(classes=(("label", 3),), objects=2, vocab=20)
        config.data.batch = 8 * config.optimizer.get("accumulate", 1)
        config.data.workers = 0
        config.data.size = FACTORS.get(name, (2,))[0]
        if config.model.name == "dit.DiT":
            config.data.size *= 2  # patches
            config.model.update(width=4, depth=1, heads=2)
        else:
            config.model.update(width=4, groups=2, blocks=1, mults=(1,))
        if config.model.get("attention"):
            config.model.attention = tuple(config.model.attention)[-1:]
        if "blocks" in config.model and (config.model.get("heads") or config.model.get("head_dim")):
            config.model.heads, config.model.head_dim = 1, None
        if "codes" in config.model:
            config.model.codes = 8
        if "start" in config:
            del config.start  # there is no run to start from
        config.log = dict(batches=1, samples=8)
        if "discriminator" in config:
            config.discriminator.update(width=4, layers=1)
            config.data.size = max(config.data.size, 8)
            config.objective.disc_start = 0
        if config.model.get("vector"):
            config.model.vector = 4
        if "tokenizer" in config:
            config.tokenizer.update(vocab=60, length=8)
        if "tokenizer" in config or field == "layout":
            config.conditioner.update(width=4, layers=1, heads=1, head_dim=4)
        if labelled:
            config.conditioner.update(classes=3, width=4)
        config.mesh = dict(data=8, fsdp=1, tensor=1)
    return config


QUICK = ("demo", "demo_autoencoder", "imagenet_dit")
SLOW = [name for name in NAMES if name not in QUICK and name != "sdxl_finetune"]


# The steps of XL are those of tests/test_finetune.py.
@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])
def test_a_small_one_takes_a_step(name, with_coder, monkeypatch, tmp_path):
    config = smaller(name)
    if "codec" in config:
        with_coder(name)
        monkeypatch.setattr(diffusion, "measure_scale", lambda *_: 2.0)
    run = build.run(config, tmp_path)
    train_step = step.make_train_step(run.loss, run.optimizer, run.ema, run.accumulate)

    @jax.jit
    def first(params, key, frozen, batch):
        state = step.init_state(params, run.optimizer)
        state, metrics = train_step(state, frozen, batch, key)
        return metrics, state.skipped

    key = jax.random.key(0)
    params = like(jax.eval_shape(run.init, key))
    batch = sharding.place(run.mesh, next(run.batches(0)))
    metrics, skipped = first(params, key, run.frozen, batch)
    assert np.isfinite(float(metrics["loss"]))
    assert float(metrics["grad_norm"]) > 0
    assert int(skipped) == 0
    assert (tmp_path / "config.json").is_file()
