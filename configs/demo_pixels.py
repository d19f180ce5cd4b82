"""`shapes` without conditions, by diffusion on the pixels themselves, on two CPU cores.

    python train.py --config configs/demo_pixels.py --workdir runs/demo/pixels
    python -m ldm_jax.evaluate --workdir runs/demo/pixels --metrics fid,prdc,bpd --features shapes:FILE

configs/demo_latents.py without a first stage: two more levels of the U-Net take the place of the autoencoder. Its
coarsest one has as many positions as the other's finest.
"""

from configs import demo_latents


def get_config():
    c = demo_latents.get_config()
    c.data.batch = 32
    c.codec = dict(name="identity")
    c.model.update(width=32, mults=(1, 2, 4), attention=(0, 0, 1))
    return c
