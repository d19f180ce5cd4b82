"""Unconditional latent diffusion on LSUN churches, U-Net 294,966,916 parameters in f8 latents.

    python train.py --config configs/kl_f8.py --workdir runs/kl_f8 --config.data.source.path=/data/openimages
    python train.py --config configs/churches_f8.py --workdir runs/churches --config.data.source.path=/data/churches

CompVis' lsun_churches-ldm-kl-8: DDPM with betas 0.0015 to 0.0155, l1 loss, batch 96, lr 5e-5 after 10,000 steps of
warm-up. Published: FID 4.02 after 500k steps (18 V100 days). Not trained here.
"""

from ml_collections import ConfigDict


def get_config():
    c = ConfigDict()
    c.seed, c.steps = 0, 500_000
    c.data = dict(
        source=dict(name="folder.folder", path="data/churches", split="train"),
        validation=dict(split="validation"),
        batch=96,
        size=256,
        crop="center",
        flip=True,
        workers=8,
        cached="",  # a folder of python -m ldm_jax.cache
    )
    c.codec = dict(name="from_autoencoder", run="runs/kl_f8")
    c.model = dict(
        name="unet.UNet",
        width=192,
        mults=(1, 2, 2, 4, 4),
        blocks=2,
        attention=(1, 1, 1, 1, 0),
        middle=1,
        heads=8,
        transformer=False,
        scale_shift=True,
        resample_blocks=True,
    )
    c.path = dict(name="ddpm", schedule="scaled_linear", beta_start=0.0015, beta_end=0.0155)
    c.target = dict(name="eps")
    c.objective = dict(name="diffusion", times="discrete", kind="l1")
    c.optimizer = dict(name="adamw", lr=5e-5, warmup=10_000, weight_decay=0.01, ema=0.9999)
    c.mesh = dict(data=-1, fsdp=1, tensor=1)
    c.sharding = ((".*", "fsdp"),)
    c.sampler = dict(solver=dict(name="ddim", eta=0.0), steps=200, spacing="leading")
    c.log = dict(every=100, evaluate=5_000, save=5_000, batches=8, samples=16)
    return c
