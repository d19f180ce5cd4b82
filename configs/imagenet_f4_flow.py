"""Class-conditional rectified flow on ImageNet-256, U-Net 400,920,579 parameters in f4 latents.

    python train.py --config configs/imagenet_f4_flow.py --workdir runs/imagenet_flow

As configs/imagenet_f4.py, but on straight paths from noise to data (Liu et al. 2023) with logit-normal times, the best
of those that Esser et al. 2024 (Stable Diffusion 3) compared. Not trained here.
"""

from configs import imagenet_f4


def get_config():
    c = imagenet_f4.get_config()
    c.path, c.target = dict(name="rectified_flow"), dict(name="flow")
    c.objective = dict(
        name="diffusion", times=dict(name="logit_normal", mean=0.0, std=1.0), drop=0.1
    )
    c.sampler = dict(solver="heun", steps=25, guidance=1.5)
    return c
