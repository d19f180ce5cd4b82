"""Unconditional latent diffusion on FFHQ, U-Net 274,056,163 parameters in f4 latents.

    python train.py --config configs/ffhq_f4.py --workdir runs/ffhq --config.data.source.path=/data/ffhq

CompVis' ffhq-ldm-vq-4, as configs/celebahq_f4.py but for batch, rate and sampler. Published: FID 4.98 after 635k steps
with 200 DDIM steps and eta 1 (26 V100 days). Not trained here.
"""

from configs import celebahq_f4


def get_config():
    c = celebahq_f4.get_config()
    c.steps = 635_000
    c.data.source.path = "data/ffhq"
    c.data.batch, c.optimizer.lr = 42, 8.4e-5
    c.sampler.update(solver=dict(name="ddim", eta=1.0), steps=200)
    return c
