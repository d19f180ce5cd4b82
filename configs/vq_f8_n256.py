"""The f8 VQ autoencoder of latent diffusion with few codes (67,652,783 parameters, 256 codes).

    python train.py --config configs/vq_f8_n256.py --workdir runs/vq_f8_n256 --config.data.source.path=/data/openimages

CompVis' models/first_stage_models/vq-f8-n256. As configs/vq_f4.py but for the model, the batch and
the discriminator's start.
Published: PSNR 22.35 dB, rFID 1.49 after 1,608,649 steps. Not trained here.
"""

from configs import vq_f4


def get_config():
    c = vq_f4.get_config()
    c.model.update(mults=(1, 2, 2, 4), z_channels=4, embed=4, codes=256)
    c.model.attention = (False, False, False, True)
    c.objective.disc_start = 250_001
    c.data.batch = 10
    c.optimizer.lr = 4.5e-5
    c.steps = 1_608_000
    return c
