"""The f16 KL autoencoder of latent diffusion (69,610,963 parameters), on a folder of pictures.

    python train.py --config configs/kl_f16.py --workdir runs/kl_f16 --config.data.source.path=/data/openimages

CompVis' configs/autoencoder/autoencoder_kl_16x16x16.yaml; all but the model as in configs/kl_f8.py. Published
(models/first_stage_models/kl-f16): PSNR 24.08 dB, rFID 0.87 after 442,998 steps. Not trained here.
"""

from configs import kl_f8


def get_config():
    c = kl_f8.get_config()
    c.model.update(mults=(1, 1, 2, 2, 4), z_channels=16, embed=16)
    c.model.attention = (False, False, False, False, True)
    return c
