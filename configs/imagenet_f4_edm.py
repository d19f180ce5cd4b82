"""Class-conditional latent diffusion on ImageNet-256 as EDM, U-Net 400,920,579 parameters in f4 latents.

    python train.py --config configs/imagenet_f4_edm.py --workdir runs/imagenet_edm

As configs/imagenet_f4.py, but with the noise levels, the preconditioning and the loss of Karras et al. 2022; the levels
that are trained are those of Karras et al. 2024 (EDM2) for latents (P_mean = -0.4, P_std = 1 at sigma_data = 0.5),
carried over to latents of unit variance: + log 2. Not trained here.
"""

from configs import imagenet_f4


def get_config():
    c = imagenet_f4.get_config()
    c.path = dict(name="edm", sigma_min=0.004, sigma_max=160.0)
    c.target = dict(name="edm", sigma_data=1.0)
    c.objective = dict(
        name="diffusion", times=dict(name="log_normal", p_mean=0.293, p_std=1.0), drop=0.1
    )
    c.sampler = dict(solver="heun", steps=32, guidance=1.5)
    return c
