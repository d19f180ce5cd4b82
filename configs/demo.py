"""The demo's second stage: text to 32x32 `shapes` in the latents of configs/demo_autoencoder.py, on two CPU cores.

python train.py --config configs/demo.py --workdir runs/demo/model
python sample.py --workdir runs/demo/model --prompt "a red cross to the left of a blue square" --n 4
"""

from ml_collections import ConfigDict

# Of the twins of the paper's models, as their figures in docs/paper.md and docs/paper_tasks.md were measured.
TWINS = dict(lr=0.02, adam_lr=2e-3, warmup=100)


def get_config():
    c = ConfigDict()
    c.seed, c.steps = 0, 800
    c.data = dict(
        source=dict(
            name="tfds_source.tfds",
            dataset="shapes/simple",
            data_dir="runs/demo/data",
            split="train",
            caption="caption",
        ),
        validation=dict(split="validation"),
        batch=64,
        size=32,
        cached="",  # a folder of python -m ldm_jax.cache
    )
    c.tokenizer = dict(kind="wordpiece", vocab=200, length=28)
    c.codec = dict(name="from_autoencoder", run="runs/demo/autoencoder")
    c.model = dict(
        name="unet.UNet",
        width=64,
        mults=(1, 2),
        blocks=1,
        attention=(1, 1),
        middle=1,
        head_dim=16,
        groups=8,
        scale_shift=True,
        vector=128,
        coordinates=True,
    )
    c.conditioner = dict(
        name="Text",
        width=128,
        layers=2,
        heads=4,
        head_dim=32,
        embedding_std=1.0,
        position_period=100.0,
        mask_padding=True,
        pool=True,
    )
    c.path, c.target = dict(name="rectified_flow"), dict(name="flow")
    c.objective = dict(
        name="diffusion", times=dict(name="logit_normal", mean=1.0, std=1.3), drop=0.1
    )
    c.optimizer = dict(
        name="muon",
        lr=0.014,
        adam_lr=4e-3,
        ns_steps=3,
        warmup=40,
        decay="cosine",
        b2=0.99,
        weight_decay=0.01,
        clip=1.0,
        ema=0.995,
    )
    c.mesh = dict(data=-1, fsdp=1, tensor=1)
    c.sharding = ((".*", "replicate"),)
    c.sampler = dict(solver="dpmpp_2m", steps=16, guidance=6.0)
    c.log = dict(every=50, evaluate=400, save=400, batches=4, samples=16)
    return c
