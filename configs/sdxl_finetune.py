"""Fine-tuning of Stable Diffusion XL (base 1.0) on captioned pictures of 1024 px: 2,567,463,684 parameters are trained.

    python train.py --config configs/sdxl_finetune.py --workdir runs/sdxl \
        --config.init.path=/models/stable-diffusion-xl-base-1.0 --config.data.source.path=/data/captioned

Needs the folder of the model as diffusers keeps it and a folder of pictures with captions. Each picture's own height
and width and the place of its crop are conditions (Podell et al. 2023, section 2.2), so smaller pictures do no harm.
Both text encoders (123,060,480 + 694,659,840 = 817,720,320) and the autoencoder (83,653,863, in float32) stay as they
are. Parameters, average and both moments are 41 GB in float32, spread over `fsdp`. Not trained here.
"""

from configs import sd15_finetune


def get_config():
    c = sd15_finetune.get_config()
    c.data.size = 1024
    c.init.path = "path/to/stable-diffusion-xl-base-1.0"
    c.sampler = dict(solver=dict(name="ddim", eta=0.0), steps=50, spacing="leading", guidance=5.0)
    c.log.update(batches=1, samples=4)
    return c
