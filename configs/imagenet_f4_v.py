"""Class-conditional latent diffusion on ImageNet-256 towards v with min-SNR weights, U-Net 400,920,579 parameters.

    python train.py --config configs/imagenet_f4_v.py --workdir runs/imagenet_v

As configs/imagenet_f4.py, but the network predicts v (Salimans & Ho 2022) and noise levels count by min(SNR, 5) (Hang
et al. 2023), with which they report convergence 3.4 times sooner. Not trained here.
"""

from configs import imagenet_f4


def get_config():
    c = imagenet_f4.get_config()
    c.target = dict(name="v")
    c.objective.weight = dict(name="min_snr", gamma=5.0)
    return c
