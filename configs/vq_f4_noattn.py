"""The f4 VQ autoencoder of latent diffusion without attention (53,219,486 parameters, 8192 codes).

    python train.py --config configs/vq_f4_noattn.py --workdir runs/vq_f4_noattn

CompVis' models/first_stage_models/vq-f4-noattn. As configs/vq_f4.py but for the model and the
discriminator's start.
Published: PSNR 25.21 dB, rFID 1.06 after 658,131 steps. Not trained here.
"""

from configs import vq_f4


def get_config():
    c = vq_f4.get_config()
    c.model.middle_attention = False
    c.objective.disc_start = 11
    c.steps = 658_000
    return c
