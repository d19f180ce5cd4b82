"""Class-conditional latent diffusion on ImageNet-256, U-Net 394,984,196 parameters in f8 latents.

    python train.py --config configs/vq_f8.py --workdir runs/vq_f8 --config.data.source.path=/data/openimages
    python train.py --config configs/imagenet_f8.py --workdir runs/imagenet_f8

CompVis' cin-ldm-vq-f8 (LDM-8), with the data of configs/imagenet_f4.py. Published: FID 17.41 without guidance after
2.9M steps of batch 64 (79 V100 days), 7.77 with a classifier's. Here a tenth of the labels is dropped, so that it can
be guided without a classifier. Not trained here.
"""

from configs import imagenet_f4


def get_config():
    c = imagenet_f4.get_config()
    c.steps = 2_900_000
    c.data.batch, c.optimizer.lr = 64, 6.4e-5
    c.codec.run = "runs/vq_f8"
    c.model.update(width=256, mults=(1, 2, 4), attention=(1, 1, 1))
    del c.model.heads
    c.model.head_dim = 32
    c.sampler.update(solver=dict(name="ddim", eta=1.0), steps=200)
    return c
