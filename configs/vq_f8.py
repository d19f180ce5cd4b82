"""The f8 VQ autoencoder of latent diffusion (67,717,295 parameters, 16,384 codes).

    python train.py --config configs/vq_f8.py --workdir runs/vq_f8 --config.data.source.path=/data/openimages

CompVis' models/first_stage_models/vq-f8. As configs/vq_f4.py but for the model, the discriminator and the batch.
Published: PSNR 23.07 dB, rFID 1.14 after 971,043 steps. Not trained here.
"""

from configs import vq_f4


def get_config():
    c = vq_f4.get_config()
    c.model.update(mults=(1, 2, 2, 4), z_channels=4, embed=4, codes=16_384)
    c.model.attention = (False, False, False, True)
    c.discriminator.layers = 2
    c.objective.update(disc_start=1, disc_weight=0.6)
    c.data.batch = 10
    c.optimizer.lr = 4.5e-5
    c.steps = 971_000
    return c
