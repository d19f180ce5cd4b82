"""Tiny data and configs for whole runs: `train.py --config tests/tiny.py:text` trains in seconds."""

import json
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

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


def common():
    c = ConfigDict()
    c.seed, c.steps = 0, 4
    c.data = dict(
        source=dict(name="folder.folder", path="", split="train"),
        validation=dict(split="all"),
        batch=8,
        size=16,
    )
    c.optimizer = dict(name="adamw", lr=1e-3, ema=0.9)
    c.mesh = dict(data=-1, fsdp=1, tensor=1)
    c.sharding = ((".*", "replicate"),)
    c.log = dict(every=1, evaluate=100, save=2, batches=1, samples=4)
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


def unconditional():
    """Stage 2, without conditions."""
    c = common()
    c.codec = dict(name="from_autoencoder", run="")
    c.model = dict(name="unet.UNet", width=8, mults=(1, 2), blocks=1, middle=1, heads=2, groups=4)
    c.model.transformer = False
    c.path, c.target = dict(name="rectified_flow"), dict(name="flow")
    c.objective = dict(name="diffusion", times="uniform")
    c.sampler = dict(solver="euler", steps=4)
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


def get_config(kind):
    """For --config tests/tiny.py:KIND."""
    return globals()[kind]()
