"""Inpainting by a model that is trained for it, U-Net 387,245,827 parameters in f4 latents, on a folder of pictures.

    python train.py --config configs/vq_f4_noattn.py --workdir runs/vq_f4_noattn
    python train.py --config configs/inpainting_big.py --workdir runs/inpainting --config.data.source.path=/data/places
    python sample.py --workdir runs/inpainting --task inpaint --image a.png --mask hole.png

CompVis' inpainting_big: beside the noise the U-Net sees the latents of the picture that is black in the hole, and the
mask (-1 and 1, the nearest pixel of each block), 3 + 3 + 1 channels; betas 0.0015 to 0.0205, l1 loss. The repository
has neither its data nor its masks; the paper takes those of LaMa. Its learning rate is a schedule of a peak of 1e-7 a
sample, which does not train; here it is 1e-6 a sample, as in the others. Published (Rombach et al. 2022, table 7): FID
1.50 and LPIPS 0.137 on Places, 40 to 50 % hidden. Not trained here; configs/demo_inpaint.py is the reduced twin that
is.
"""

from ml_collections import ConfigDict


def get_config():
    c = ConfigDict()
    c.seed, c.steps = 0, 860_000
    c.data = dict(
        source=dict(name="folder.folder", path="data/places", split="train", convention="none"),
        validation=dict(split="validation"),
        batch=64,
        size=256,
        crop="random",
        flip=True,
        workers=8,
        holes=("thick", "medium", "thin", "boxes"),
        blank=-1.0,
    )
    c.codec = dict(name="from_autoencoder", run="runs/vq_f4_noattn")
    c.model = dict(
        name="unet.UNet",
        width=256,
        mults=(1, 2, 3, 4),
        blocks=2,
        attention=(0, 1, 1, 1),
        middle=1,
        heads=8,
        transformer=False,
        resample_blocks=True,
    )
    c.conditioner = dict(
        name="Combine",
        parts=(
            dict(name="Spatial", field="masked"),
            dict(name="Spatial", field="hole", factor=4, nearest=True, signed=True),
        ),
    )
    c.path = dict(name="ddpm", schedule="scaled_linear", beta_start=0.0015, beta_end=0.0205)
    c.target = dict(name="eps")
    c.objective = dict(name="diffusion", times="discrete", kind="l1")
    c.optimizer = dict(name="adamw", lr=6.4e-5, warmup=1_000, weight_decay=0.01, ema=0.9999)
    c.mesh = dict(data=-1, fsdp=1, tensor=1)
    c.sharding = ((".*", "fsdp"),)
    c.sampler = dict(solver=dict(name="ddim", eta=0.0), steps=50, spacing="leading")
    c.log = dict(every=100, evaluate=5_000, save=5_000, batches=4, samples=16)
    return c
