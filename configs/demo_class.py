"""A class-conditional U-Net on `shapes`, in the latents of configs/demo_autoencoder.py, on two CPU cores.

    python train.py --config configs/demo_class.py --workdir runs/demo/class
    python -m ldm_jax.evaluate --workdir runs/demo/class --metrics condition

The twin of configs/imagenet_f4.py; a class is the colour and shape of the object that a picture's caption names first.
"""

from configs import demo


def get_config():
    c = demo.get_config()
    c.steps = 600
    c.optimizer.update(demo.TWINS)
    del c.data.source.caption, c.tokenizer, c.conditioner
    c.data.source.label = "label"
    c.conditioner = dict(name="Label", width=128, into="vector")
    c.model.update(transformer=False)  # there are no tokens to read
    c.sampler.guidance = 3.0
    c.log.update(evaluate=300, save=300)
    return c
