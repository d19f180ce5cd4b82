"""The f4 KL autoencoder of latent diffusion (55,312,063 parameters), on a folder of pictures.

    python train.py --config configs/kl_f4.py --workdir runs/kl_f4 --config.data.source.path=/data/openimages

CompVis' configs/autoencoder/autoencoder_kl_64x64x3.yaml; all but the model as in configs/kl_f8.py. Published
(models/first_stage_models/kl-f4): PSNR 27.53 dB, rFID 0.27 after 176,991 steps. Not trained here.
"""

from configs import kl_f8


def get_config():
    c = kl_f8.get_config()
    c.model.update(mults=(1, 2, 4), z_channels=3, embed=3)
    c.model.attention = ()
    return c
