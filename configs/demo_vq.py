"""A small f4 VQ-GAN on the 32x32 `shapes`, on one CPU core: the whole loss but LPIPS, the codebook a moving average.

python -m ldm_jax.data.shapes --data_dir runs/demo/data --config simple
python train.py --config configs/demo_vq.py --workdir runs/demo/vq
"""

from ml_collections import ConfigDict


def get_config():
    c = ConfigDict()
    c.seed, c.steps = 0, 2_000
    c.data = dict(
        source=dict(
            name="tfds_source.tfds",
            dataset="shapes/simple",
            data_dir="runs/demo/data",
            split="train",
        ),
        validation=dict(split="validation"),
        batch=16,
        size=32,
    )
    c.model = dict(
        name="vq.VQAutoencoder",
        width=16,
        mults=(1, 2, 4),
        blocks=1,
        z_channels=4,
        embed=4,
        codes=128,
        groups=4,
    )
    c.codebook = dict(name="average", decay=0.99, revive=0.1)
    c.discriminator = dict(name="discriminator.PatchGAN", width=16, layers=2)
    c.objective = dict(
        name="autoencoder",
        kind="l1",
        normalization="mean",
        beta=0.25,
        disc_start=500,
        disc_weight=0.5,
    )
    c.optimizer = dict(
        name="muon",
        lr=0.02,
        adam_lr=2e-3,
        ns_steps=3,
        warmup=50,
        decay="cosine",
        b2=0.99,
        weight_decay=0.0,
        ema=0.99,
    )
    c.mesh = dict(data=-1, fsdp=1, tensor=1)
    c.sharding = ((".*", "replicate"),)
    c.log = dict(every=50, evaluate=250, save=500, batches=16, samples=8)
    return c
