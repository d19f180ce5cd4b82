"""Fine-tuning of Stable Diffusion 2.1 on captioned pictures of 768 px, towards v: 865,910,724 parameters are trained.

    python train.py --config configs/sd21_finetune.py --workdir runs/sd21 \
        --config.init.path=/models/stable-diffusion-2-1 --config.data.source.path=/data/captioned

Needs the folder of the model as diffusers keeps it, whose scheduler says that it predicts v (2.1-base predicts eps, at
512 px), and a folder of pictures with captions. The text encoder (340,387,840) and the autoencoder (83,653,863) stay as
they are. Not trained here.
"""

from configs import sd15_finetune


def get_config():
    c = sd15_finetune.get_config()
    c.data.size = 768
    c.init.path = "path/to/stable-diffusion-2-1"
    return c
