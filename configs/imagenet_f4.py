"""Class-conditional latent diffusion on ImageNet-256, U-Net 400,920,579 parameters in f4 latents.

    python train.py --config configs/vq_f4.py --workdir runs/vq_f4 --config.data.source.path=/data/openimages
    python train.py --config configs/imagenet_f4.py --workdir runs/imagenet
    python sample.py --workdir runs/imagenet --label "tench, Tinca tinca" --n 16 --guidance 1.5

CompVis' cin256-v2, whose null condition is a 1001st class. Published (LDM-4-G): FID 3.60 with guidance 1.5 and 250 DDIM
steps, after 178k steps of batch 1200 (271 V100 days). Not trained here. TFDS prepares imagenet2012 once from the
archives, see docs/guide.md.
"""

from ml_collections import ConfigDict


def get_config():
    c = ConfigDict()
    c.seed, c.steps = 0, 178_000
    c.data = dict(
        source=dict(
            name="tfds_source.tfds",
            dataset="imagenet2012",
            data_dir="data",
            split="train",
            label="label",
        ),
        validation=dict(split="validation"),
        batch=1200,
        size=256,
        crop="random",
        workers=8,
        cached="",  # a folder of python -m ldm_jax.cache, which takes centre crops
    )
    c.codec = dict(name="from_autoencoder", run="runs/vq_f4")
    c.model = dict(
        name="unet.UNet",
        width=192,
        mults=(1, 2, 3, 5),
        blocks=2,
        attention=(0, 1, 1, 1),
        middle=1,
        heads=1,
        dtype="bfloat16",  # of the computation; parameters stay in float32
    )
    c.conditioner = dict(name="Label", classes=1000, width=512)
    c.path = dict(name="ddpm", schedule="scaled_linear", beta_start=0.0015, beta_end=0.0195)
    c.target = dict(name="eps")
    c.objective = dict(name="diffusion", times="discrete", drop=0.1)
    c.optimizer = dict(name="adamw", lr=1e-4, weight_decay=0.01, ema=0.9999, accumulate=1)
    c.mesh = dict(data=-1, fsdp=1, tensor=1)
    c.sharding = ((".*", "fsdp"),)
    c.sampler = dict(solver=dict(name="ddim", eta=0.0), steps=250, spacing="leading", guidance=1.5)
    c.log = dict(every=100, evaluate=5_000, save=5_000, batches=4, samples=16)
    return c
