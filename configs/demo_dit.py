"""A class-conditional DiT on `shapes`, in the latents of configs/demo_autoencoder.py, on two CPU cores.

    python train.py --config configs/demo_dit.py --workdir runs/demo/dit
    python -m ldm_jax.evaluate --workdir runs/demo/dit --metrics condition

The twin of configs/imagenet_dit.py, on straight paths as configs/demo.py. Classes as in configs/demo_class.py.
"""

from configs import demo_class


def get_config():
    c = demo_class.get_config()
    c.steps = 1_500
    c.model = dict(name="dit.DiT", width=128, depth=6, heads=4, patch=1)
    c.conditioner.embedding_std = 0.02
    c.optimizer.adam = ".*/(patches|last/linear)/kernel"
    c.log.update(evaluate=500, save=500)
    return c
