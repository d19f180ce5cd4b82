"""The f32 KL autoencoder of latent diffusion (103,880,131 parameters), on a folder of pictures.

    python train.py --config configs/kl_f32.py --workdir runs/kl_f32 --config.data.source.path=/data/openimages

CompVis' configs/autoencoder/autoencoder_kl_8x8x64.yaml; all but the model as in configs/kl_f8.py. Published
(models/first_stage_models/kl-f32): PSNR 22.27 dB, rFID 2.04 after 406,763 steps. Not trained here.
"""

from configs import kl_f8


def get_config():
    c = kl_f8.get_config()
    c.model.update(mults=(1, 1, 2, 2, 4, 4), z_channels=64, embed=64)
    c.model.attention = (False, False, False, False, True, True)
    return c
