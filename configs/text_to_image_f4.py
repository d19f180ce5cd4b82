"""Text-to-image latent diffusion in f4 latents: U-Net 403,623,939 parameters, text encoder 166,590,080.

    python train.py --config configs/vq_f4.py --workdir runs/vq_f4 --config.data.source.path=/data/openimages
    python train.py --config configs/text_to_image_f4.py --workdir runs/text_f4

CompVis' text2img256, as configs/text_to_image_f8.py but for first stage, sizes, betas, batch and rate. Published: FID
16.79 on Conceptual Captions with 100 DDIM steps without guidance. Here a tenth of the captions is dropped, so that it
can be guided. Not trained here.
"""

from configs import text_to_image_f8


def get_config():
    c = text_to_image_f8.get_config()
    c.data.batch = 28
    c.codec.run = "runs/vq_f4"
    c.model.update(width=192, mults=(1, 2, 3, 5), attention=(0, 1, 1, 1))
    del c.model.heads
    c.model.head_dim = 32
    c.conditioner.width = 640
    c.path.update(beta_start=0.0015, beta_end=0.0195)
    c.optimizer.update(lr=5.6e-5, warmup=0)
    c.sampler.update(steps=100)
    return c
