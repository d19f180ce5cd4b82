"""The f16 VQ autoencoder of latent diffusion (69,593,371 parameters, 16,384 codes).

    python train.py --config configs/vq_f16.py --workdir runs/vq_f16 --config.data.source.path=/data/openimages

CompVis' models/first_stage_models/vq-f16. As configs/vq_f4.py but for the model, the discriminator and the batch.
Published: PSNR 20.83 dB, rFID 5.15 after 1,101,166 steps. Not trained here.
"""

from configs import vq_f4


def get_config():
    c = vq_f4.get_config()
    c.model.update(mults=(1, 1, 2, 2, 4), z_channels=8, embed=8, codes=16_384)
    c.model.attention = (False, False, False, False, True)
    c.discriminator.layers = 2
    c.objective.disc_start = 250_001
    c.data.batch = 14
    c.optimizer.lr = 6.3e-5
    c.steps = 1_101_000
    return c
