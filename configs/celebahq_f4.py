"""Unconditional latent diffusion on CelebA-HQ, U-Net 274,056,163 parameters in f4 latents.

    python train.py --config configs/vq_f4.py --workdir runs/vq_f4 --config.data.source.path=/data/openimages
    python train.py --config configs/celebahq_f4.py --workdir runs/celebahq --config.data.source.path=/data/celebahq

CompVis' celebahq-ldm-vq-4: DDPM with betas 0.0015 to 0.0195, batch 48, lr 2e-6 a sample. Published: FID 5.11 after 410k
steps with 500 DDIM steps (14.4 V100 days). Not trained here.
"""

from ml_collections import ConfigDict


def get_config():
    c = ConfigDict()
    c.seed, c.steps = 0, 410_000
    c.data = dict(
        source=dict(name="folder.folder", path="data/celebahq", split="train"),
        validation=dict(split="validation"),
        batch=48,
        size=256,
        crop="center",
        workers=8,
        cached="",  # a folder of python -m ldm_jax.cache
    )
    c.codec = dict(name="from_autoencoder", run="runs/vq_f4")
    c.model = dict(
        name="unet.UNet",
        width=224,
        mults=(1, 2, 3, 4),
        blocks=2,
        attention=(0, 1, 1, 1),
        middle=1,
        head_dim=32,
        transformer=False,
    )
    c.path = dict(name="ddpm", schedule="scaled_linear", beta_start=0.0015, beta_end=0.0195)
    c.target = dict(name="eps")
    c.objective = dict(name="diffusion", times="discrete")
    c.optimizer = dict(name="adamw", lr=9.6e-5, weight_decay=0.01, ema=0.9999)
    c.mesh = dict(data=-1, fsdp=1, tensor=1)
    c.sharding = ((".*", "fsdp"),)
    c.sampler = dict(solver=dict(name="ddim", eta=0.0), steps=500, spacing="leading")
    c.log = dict(every=100, evaluate=5_000, save=5_000, batches=8, samples=16)
    return c
