"""Boxes with names to `shapes`, in the latents of configs/demo_autoencoder.py, on two CPU cores.

    python train.py --config configs/demo_layout.py --workdir runs/demo/layout
    python -m ldm_jax.evaluate --workdir runs/demo/layout --metrics condition --n 256
    python sample.py --workdir runs/demo/layout --boxes boxes.json

The reduced twin of configs/layout_openimages.py: up to two objects of 6 x 3 colours and shapes, corners on a grid of 17
x 17 points. docs/paper_tasks.md has its figures.
"""

from configs import demo


def get_config():
    c = demo.get_config()
    c.steps = 800
    c.optimizer.update(demo.TWINS)
    c.data.batch = 32
    c.data.layout = dict(classes=(("colour", 6), ("shape", 3)), objects=2, vocab=290, window=False)
    del c.tokenizer
    c.conditioner.update(field="layout", mask_padding=False, position_period=None)
    c.sampler.guidance = 3.0
    return c
