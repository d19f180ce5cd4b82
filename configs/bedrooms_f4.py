"""Unconditional latent diffusion on LSUN bedrooms, U-Net 274,056,163 parameters in f4 latents.

    python train.py --config configs/bedrooms_f4.py --workdir runs/bedrooms --config.data.source.path=/data/bedrooms
    python train.py --config configs/bedrooms_f4.py --workdir runs/bedrooms \
        --config.data.source.name=lsun.lsun --config.data.source.path=/data/lsun/bedroom

The second reads LSUN's own database, bedroom_train_lmdb. CompVis' lsun_bedrooms-ldm-vq-4, as configs/celebahq_f4.py
but for mirror images, length and sampler. Published: FID 2.95 after 1.9M steps with 200 DDIM steps and eta 1 (60 V100
days). Not trained here.
"""

from configs import celebahq_f4


def get_config():
    c = celebahq_f4.get_config()
    c.steps = 1_900_000
    c.data.source.path = "data/bedrooms"
    c.data.flip = True
    c.sampler.update(solver=dict(name="ddim", eta=1.0), steps=200)
    return c
