"""Tiny data and configs for whole runs: `train.py --config tests/tiny.py:text` trains in seconds."""

import atexit
import contextlib
import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict
from PIL import Image

from ldm_jax import tree

ROOT = Path(__file__).parent.parent

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 70, 230)}


def pictures(folder, n=48, size=16, captions=True):
    """Pictures of one coloured square each, with captions beside them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng, lines = np.random.default_rng(0), []
    for i in range(n):
        name = list(COLOURS)[i % len(COLOURS)]
        image = np.full((size, size, 3), 230, np.uint8)
        y, x = rng.integers(0, size // 2, 2)
        image[y : y + size // 2, x : x + size // 2] = COLOURS[name]
        Image.fromarray(image).save(folder / f"{i:03d}.png")
        lines.append(json.dumps({"file_name": f"{i:03d}.png", "text": f"a {name} square"}) + "\n")
    if captions:
        (folder / "metadata.jsonl").write_text("".join(lines))
    return folder


def classes(folder, n=48, size=16):
    """The same pictures, in one folder a colour."""
    plain = pictures(Path(folder) / "plain", n, size, captions=False)
    for i, path in enumerate(sorted(plain.iterdir())):
        name = list(COLOURS)[i % len(COLOURS)]
        target = Path(folder) / "sorted" / name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    return Path(folder) / "sorted"


def simple_shapes(folder, **splits):
    """`shapes/simple` with so many pictures in its splits, prepared below a folder."""
    from ldm_jax.data.shapes import shapes_dataset_builder, vocabulary

    few = shapes_dataset_builder.config(vocabulary.SIMPLE._replace(splits=splits))
    of = shapes_dataset_builder.Builder
    # A class of its own: TFDS remembers the configs of one.
    own = {"BUILDER_CONFIGS": [few], "name": of.name, "__module__": of.__module__}
    builder = types.new_class("Few", (of,), {"skip_registration": True}, lambda ns: ns.update(own))
    builder(
        data_dir=str(folder), config="simple", file_format="array_record"
    ).download_and_prepare()
    return folder


def common():
    c = ConfigDict()
    c.seed, c.steps = 0, 4
    c.data = dict(
        source=dict(name="folder.folder", path="", split="train"),
        validation=dict(split="all"),
        batch=8,
        size=16,
        crop="center",
        flip=False,
        workers=0,
    )
    c.optimizer = dict(name="adamw", lr=1e-3, ema=0.9)
    c.mesh = dict(data=-1, fsdp=1, tensor=1)
    c.sharding = ((".*", "replicate"),)
    c.log = dict(every=1, evaluate=100, save=2, batches=1, samples=4, wandb="")
    return c


def autoencoder():
    """Stage 1 with a discriminator that is active from step 1."""
    c = common()
    c.model = dict(
        name="autoencoder.KLAutoencoder",
        width=8,
        mults=(1, 2),
        blocks=1,
        z_channels=2,
        embed=2,
        groups=4,
        middle_attention=False,
    )
    c.discriminator = dict(name="discriminator.PatchGAN", width=8, layers=1)
    c.objective = dict(name="autoencoder", kind="l1", kl_weight=1e-6, disc_start=1)
    return c


def vq():
    """Stage 1 with codes, whose codebook is a moving average."""
    c = autoencoder()
    c.model.update(name="vq.VQAutoencoder", codes=16)
    del c.objective.kl_weight
    c.objective.normalization = "mean"
    c.codebook = dict(name="average", revive=0.1)
    return c


def unconditional():
    """Stage 2, without conditions."""
    c = common()
    c.data.cached = ""
    c.codec = dict(name="from_autoencoder", run="")
    c.model = dict(name="unet.UNet", width=8, mults=(1, 2), blocks=1, middle=1, heads=2, groups=4)
    c.model.transformer = False
    c.path, c.target = dict(name="rectified_flow"), dict(name="flow")
    c.objective = dict(name="diffusion", times="uniform")
    c.sampler = dict(solver="euler", steps=4)
    return c


def pixels():
    """Without a first stage: what compiles soonest."""
    c = unconditional()
    c.codec = dict(name="identity")
    c.model.update(middle=0, heads=None)
    c.sampler.steps = 2
    return c


def judged():
    """The same, measured while it trains."""
    c = pixels()
    c.data.size = 32  # that of the features
    c.evaluation = dict(every=2, metrics=("kid",), n=16, features="", batch=8, subset=8)
    return c


def text():
    """Stage 2, conditioned on the captions."""
    c = unconditional()
    c.tokenizer = dict(kind="wordpiece", vocab=60, length=8)
    c.conditioner = dict(name="Text", width=8, layers=1, heads=2, head_dim=4)
    c.model.update(attention=(0, 1), middle=0, transformer=True)
    c.objective.drop = 0.1
    c.sampler.guidance = 2.0
    return c


def label():
    """Stage 2, conditioned on the class."""
    c = unconditional()
    c.conditioner = dict(name="Label", classes=3, width=8, into="vector")
    c.model.vector = 8
    c.objective.drop = 0.1
    c.sampler.guidance = 2.0
    return c


def transformer():
    """A DiT with a learned variance, conditioned on the class."""
    c = label()
    c.model = dict(name="dit.DiT", width=8, depth=2, heads=2, patch=2, variance=True)
    c.path = dict(name="ddpm", schedule="linear", beta_start=1e-4, beta_end=0.02)
    c.target = dict(name="eps")
    c.objective.update(times="discrete", bound=0.001)
    with c.ignore_type():
        c.sampler.solver = dict(name="ddpm", variance="learned")
    return c


def painting():
    """Stage 2, conditioned on captions, masks and what these leave of the pictures."""
    c = text()
    words = c.conditioner.to_dict()
    hole, left = (dict(name="Spatial", field=name) for name in ("hole", "masked"))
    del c.conditioner, c.objective.drop
    c.conditioner = dict(name="Combine", parts=(words, hole | dict(factor=2), left))
    c.objective.drop = dict(tokens=0.1)
    return c


def upscale():
    """Stage 2, conditioned on the picture at half its size, which is that of the latents."""
    c = unconditional()
    c.data.shrink = 2
    c.conditioner = dict(name="Spatial", field="small")
    return c


def semantic():
    """Stage 2, conditioned on maps of classes."""
    c = unconditional()
    c.data.source = dict(name="maps.folder", path="", maps="", split="train")
    c.conditioner = dict(name="Spatial", field="segmentation", classes=4, channels=3, factor=2)
    return c


def layout():
    """Stage 2, conditioned on boxes."""
    c = text()
    c.data.source = dict(name="open_images.open_images", path="", split="train", fewest=1)
    c.data.validation = dict(split="validation")
    c.data.layout = dict(classes=(("label", 3),), objects=2, vocab=50)
    del c.tokenizer
    c.conditioner.field = "layout"
    return c


def retrieval():
    """Stage 2, conditioned on the features of neighbours."""
    c = unconditional()
    c.data.source = dict(name="neighbours.folder", path="", index="", neighbours=2)
    c.conditioner = dict(name="Tokens", field="neighbours", count=2, width=64)
    c.model.update(attention=(0, 1), middle=0, transformer=True)
    return c


def get_config(kind):
    """For --config tests/tiny.py:KIND."""
    return globals()[kind]()


@functools.cache
def scratch():
    """A folder for what several tests share; gone when the session ends."""
    path = Path(tempfile.mkdtemp(prefix="ldm_jax_tests_"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@functools.cache
def shared_pictures():
    return pictures(scratch() / "pictures")


@functools.cache
def shared_classes():
    return classes(scratch() / "classes")


@functools.cache
def shared_maps():
    """Maps of classes of `shared_pictures`: 1 to 3 where a square is, by its colour, 0 around it."""
    folder = scratch() / "maps"
    folder.mkdir()
    for path in sorted(shared_pictures().glob("*.png")):
        pixels = np.asarray(Image.open(path)).astype(int)
        colours = [np.abs(pixels - colour).sum(-1) < 30 for colour in COLOURS.values()]
        classes = sum((i + 1) * where for i, where in enumerate(colours))
        Image.fromarray(classes.astype(np.uint8)).save(folder / path.name)
    return folder


@functools.cache
def shared_boxes():
    """The same pictures and the boxes of their squares, laid out as OpenImages."""
    folder = scratch() / "boxes"
    lines = ["ImageID,LabelName,XMin,XMax,YMin,YMax,IsGroupOf"]
    for path in sorted(shared_maps().iterdir()):
        classes = np.asarray(Image.open(path))
        (ys, xs), n = np.nonzero(classes), len(classes)
        box = (xs.min() / n, (xs.max() + 1) / n, ys.min() / n, (ys.max() + 1) / n)
        lines.append(f"{path.stem},/m/{classes.max()},{','.join(map(str, box))},0")
        for split in ("train", "validation"):
            target = folder / split / f"{path.stem:0>16}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.open(shared_pictures() / path.name).save(target)
    for table in ("oidv6-train-annotations-bbox.csv", "validation-annotations-bbox.csv"):
        (folder / table).write_text("\n".join(lines) + "\n")
    names = "".join(f"/m/{i + 1},{name}\n" for i, name in enumerate(COLOURS))
    (folder / "class-descriptions-boxable.csv").write_text(names)
    return folder


@functools.cache
def shared_features():
    """A feature network of `shapes` with random weights."""
    from tests.test_quality import random_network

    return f"shapes:{random_network(scratch() / 'features.safetensors')}"


@functools.cache
def shared_index():
    """An index of `shared_pictures` by their mean colours."""
    from ldm_jax.data import neighbours

    files = sorted(shared_pictures().glob("*.png"))
    means = np.stack([np.asarray(Image.open(file)).mean((0, 1)) for file in files])
    vectors = np.concatenate([means, np.ones((len(files), 1))], 1)
    neighbours.write(scratch() / "index.npz", [file.name for file in files], vectors, 4)
    return scratch() / "index.npz"


@functools.cache
def shared_features_index():
    """The same, by the features of `shared_features`, of pictures of the size that these are for."""
    from ldm_jax.data import neighbours
    from ldm_jax.quality import embedding, pictures

    by = embedding.named(None, shared_features())
    of = pictures.of_folder(shared_pictures(), by.size, convention="none")
    path = scratch() / "features_index.npz"
    neighbours.write(path, of.names, by.embed(of), 4, network=by.network)
    return path


@functools.cache
def shared_autoencoder(kind="autoencoder"):
    """The work directory of an autoencoder ("autoencoder", "vq") with the parameters of step 0."""
    return saved_at_start(config_of(kind), scratch() / kind)


@functools.cache
def shared_model(kind):
    """The work directory of a diffusion model ("text", "label", "transformer" ...) at step 0."""
    return saved_at_start(config_of(kind), scratch() / kind)


def config_of(kind):
    """A config of this file with its data and its autoencoder in place."""
    config = get_config(kind)
    folders = dict(label=shared_classes, transformer=shared_classes, layout=shared_boxes)
    config.data.source.path = str(folders.get(kind, shared_pictures)())
    if kind == "semantic":
        config.data.source.maps = str(shared_maps())
    if kind == "retrieval":
        config.data.source.index = str(shared_features_index())
    if "run" in config.get("codec", {}):
        config.codec.run = str(shared_autoencoder())
    if "evaluation" in config:
        config.evaluation.features = shared_features()
    return config


def saved_at_start(config, workdir):
    from ldm_jax import build
    from ldm_jax.training import checkpoints, loop

    run = build.run(config, workdir)
    with contextlib.closing(checkpoints.Checkpoints(workdir)) as saved:
        state, _ = loop.start_state(run, saved)
        saved.save(state)
    return Path(workdir)


def arguments(kind, workdir, *more):
    """The arguments of train.py for a config of this file."""
    config = config_of(kind)
    given = [f"--config.data.source.path={config.data.source.path}"]
    if "run" in config.get("codec", {}):
        given.append(f"--config.codec.run={config.codec.run}")
    if "evaluation" in config:
        given.append(f"--config.evaluation.features={config.evaluation.features}")
    return ["--config", f"{__file__}:{kind}", "--workdir", str(workdir), *given, *more]


def call(script, *argv):
    """Runs an entry point in this process; the exit status. What it prints is for capsys."""
    from ldm_jax import cli

    spec = importlib.util.spec_from_file_location(f"entry_{script}", ROOT / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)  # anew: its flags are unset
    argv, before = [f"{script}.py", *map(str, argv)], sys.argv
    sys.argv = argv  # ml_collections finds overrides there
    try:
        module.main(cli.parse(module.FLAGS, argv))
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = before
    return 0


def environment():
    """For a subprocess: quick compiles, kept for the next one."""
    own = {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(scratch() / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(ROOT),
    }
    return os.environ | own


def spawn(*argv):
    """Runs Python in a process of its own, to its end."""
    return subprocess.run(
        [sys.executable, *map(str, argv)],
        env=environment(),
        cwd=scratch(),
        capture_output=True,
        text=True,
        timeout=600,
    )


def metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(workdir):
    """What was logged of the training steps, without the clock."""
    clock = (
        "seconds",
        "steps_per_second",
        "waiting_for_data",
        "images_per_second",
        "tflops",
        "mfu",
    )
    aside = (*clock, "memory_gb", "goodput")
    lines = [m for m in metrics(workdir) if "loss" in m]
    return [{k: v for k, v in line.items() if k.split("/")[0] not in aside} for line in lines]


def assert_equal(a, b):
    for name, x, y in zip(tree.names(a), jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=name)


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
    """For the test modules that import it: XLA takes less time to compile, and keeps what it compiled."""
    new = {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": str(scratch() / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    old = {name: jax.config.values[name] for name in new}
    for name, value in new.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in old.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
