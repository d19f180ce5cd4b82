"""The demo's first stage: a small f4 KL autoencoder on the 32x32 `shapes`, on two CPU cores.

python -m ldm_jax.data.shapes --data_dir runs/demo/data --config simple
python train.py --config configs/demo_autoencoder.py --workdir runs/demo/autoencoder
"""

from ml_collections import ConfigDict


def get_config():
    c = ConfigDict()
    c.seed, c.steps = 0, 500
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
        name="autoencoder.KLAutoencoder",
        width=16,
        mults=(1, 2, 4),
        blocks=1,
        z_channels=4,
        embed=4,
        groups=4,
    )
    c.objective = dict(name="autoencoder", kind="l2", kl_weight=4e-3)
    c.optimizer = dict(
        name="muon",
        lr=0.02,
        adam_lr=2e-3,
        ns_steps=3,
        warmup=50,
        decay="cosine",
        b2=0.99,
        weight_decay=0.0,
        clip=1e4,
        ema=0.99,
    )
    c.mesh = dict(data=-1, fsdp=1, tensor=1)
    c.sharding = ((".*", "replicate"),)
    c.log = dict(every=50, evaluate=250, save=250, batches=4, samples=8)
    return c
