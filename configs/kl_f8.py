"""The f8 KL autoencoder of latent diffusion and Stable Diffusion (83,653,863 parameters), on a folder of pictures.

    python train.py --config configs/kl_f8.py --workdir runs/kl_f8 --config.data.source.path=/data/openimages

CompVis' configs/autoencoder/autoencoder_kl_32x32x4.yaml: batch 12 x 2 accumulated, 4.5e-6 a sample, 256x256 crops,
discriminator from step 50,001. Published (models/first_stage_models/kl-f8): PSNR 24.19 dB, rFID 0.90 after 246,803
steps. Not trained here. The loss is l1 + LPIPS + KL + PatchGAN, all but the last as sums over a picture. LPIPS is off
without the file of its weights: --config.perceptual.file=FILE, see docs/guide.md.
"""

from ml_collections import ConfigDict


def get_config():
    c = ConfigDict()
    c.seed, c.steps = 0, 250_000
    c.data = dict(
        source=dict(name="folder.folder", path="data/openimages", split="train"),
        validation=dict(split="validation"),
        batch=24,
        size=256,
        crop="random",
        flip=True,
        workers=8,
    )
    c.model = dict(
        name="autoencoder.KLAutoencoder",
        width=128,
        mults=(1, 2, 4, 4),
        blocks=2,
        z_channels=4,
        embed=4,
    )
    c.discriminator = dict(name="discriminator.PatchGAN", width=64, layers=3)
    c.perceptual = dict(name="lpips.LPIPS", weight=1.0, file="")
    c.objective = dict(
        name="autoencoder",
        kind="l1",
        normalization="sum",
        kl_weight=1e-6,
        disc_start=50_001,
        disc_weight=0.5,
    )
    c.optimizer = dict(
        name="adamw", lr=1.08e-4, b1=0.5, b2=0.9, weight_decay=0.0, ema=0.999, accumulate=2
    )
    c.mesh = dict(data=-1, fsdp=1, tensor=1)
    c.sharding = ((".*", "replicate"),)
    c.log = dict(every=100, evaluate=5_000, save=5_000, batches=16, samples=8)
    return c
