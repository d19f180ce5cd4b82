"""Text-to-image latent diffusion, 1.45 B parameters: U-Net 872,300,484, text encoder 542,895,360, in f8 latents.

    python train.py --config configs/kl_f8.py --workdir runs/kl_f8 --config.data.source.path=/data/openimages
    python train.py --config configs/text_to_image_f8.py --workdir runs/text --config.data.source.path=/data/captioned
    python sample.py --workdir runs/text --prompt "a painting of a lighthouse" --n 4

CompVis' txt2img-1p4B: DDPM with betas 0.00085 to 0.012, a trained transformer over 77 tokens; parameters and optimizer
sharded over fsdp. The vocabulary is learnt from the captions instead of BERT's. Published: FID 12.63 on COCO with
guidance 1.5 and 250 DDIM steps. Not trained here.
"""

from ml_collections import ConfigDict


def get_config():
    c = ConfigDict()
    c.seed, c.steps = 0, 390_000
    c.data = dict(
        source=dict(name="folder.folder", path="data/captioned", split="train"),
        validation=dict(split="validation"),
        batch=680,
        size=256,
        crop="center",
        workers=8,
        cached="",  # a folder of python -m ldm_jax.cache, which takes centre crops
    )
    c.tokenizer = dict(kind="wordpiece", vocab=30_522, length=77)
    c.codec = dict(name="from_autoencoder", run="runs/kl_f8")
    c.model = dict(
        name="unet.UNet",
        width=320,
        mults=(1, 2, 4, 4),
        blocks=2,
        attention=(1, 1, 1, 0),
        middle=1,
        heads=8,
        dtype="bfloat16",
        remat=True,
    )
    c.conditioner = dict(
        name="Text", width=1280, layers=32, heads=8, head_dim=64, dtype="bfloat16", remat=True
    )
    c.path = dict(name="ddpm", schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    c.target = dict(name="eps")
    c.objective = dict(name="diffusion", times="discrete", drop=0.1)
    c.optimizer = dict(name="adamw", lr=5e-5, warmup=10_000, weight_decay=0.01, ema=0.9999)
    c.mesh = dict(data=1, fsdp=-1, tensor=1)
    c.sharding = ((".*", "fsdp"),)
    c.sampler = dict(solver=dict(name="ddim", eta=0.0), steps=50, spacing="leading", guidance=5.0)
    c.log = dict(every=100, evaluate=5_000, save=5_000, batches=4, samples=16)
    return c
