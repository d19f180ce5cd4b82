"""The f4 VQ autoencoder of latent diffusion (55,322,782 parameters, 8192 codes), on a folder of pictures.

    python train.py --config configs/vq_f4.py --workdir runs/vq_f4 --config.data.source.path=/data/openimages

CompVis' models/first_stage_models/vq-f4: batch 8, 4.5e-6 a sample, 256x256 crops, discriminator from the first step.
Published: PSNR 27.43 dB, rFID 0.58 after 533,066 steps. Not trained here. The loss is l1 + LPIPS + codebook + PatchGAN,
all as means; its beta weighs the codebook's term, as in the original (`legacy`). LPIPS is off without the file of its
weights: --config.perceptual.file=FILE, see docs/guide.md.
"""

from ml_collections import ConfigDict


def get_config():
    c = ConfigDict()
    c.seed, c.steps = 0, 533_000
    c.data = dict(
        source=dict(name="folder.folder", path="data/openimages", split="train"),
        validation=dict(split="validation"),
        batch=8,
        size=256,
        crop="random",
        flip=True,
        workers=8,
    )
    c.model = dict(
        name="vq.VQAutoencoder",
        width=128,
        mults=(1, 2, 4),
        blocks=2,
        z_channels=3,
        embed=3,
        codes=8192,
        middle_attention=True,
    )
    c.model.attention = ()
    c.discriminator = dict(name="discriminator.PatchGAN", width=64, layers=3)
    c.perceptual = dict(name="lpips.LPIPS", weight=1.0, file="")
    c.objective = dict(
        name="autoencoder",
        kind="l1",
        normalization="mean",
        codebook_weight=1.0,
        beta=0.25,
        legacy=True,
        disc_start=0,
        disc_weight=0.75,
    )
    c.optimizer = dict(
        name="adamw", lr=3.6e-5, b1=0.5, b2=0.9, weight_decay=0.0, ema=0.999, accumulate=1
    )
    c.mesh = dict(data=-1, fsdp=1, tensor=1)
    c.sharding = ((".*", "replicate"),)
    c.log = dict(every=100, evaluate=5_000, save=5_000, batches=16, samples=8)
    return c
