"""Maps of classes to `shapes`, in the latents of configs/demo_autoencoder.py, on two CPU cores.

    python train.py --config configs/demo_semantic.py --workdir runs/demo/semantic
    python -m ldm_jax.evaluate --workdir runs/demo/semantic --metrics condition --n 256
    python sample.py --workdir runs/demo/semantic --task semantic --map map.png

The reduced twin of configs/semantic_256.py: 0 is background, 1 to 3 are square, triangle and cross; colours are the
model's choice. docs/paper_tasks.md has its figures.
"""

from configs import demo


def get_config():
    c = demo.get_config()
    c.steps = 600
    c.optimizer.update(demo.TWINS)
    c.data.batch = 32
    del c.tokenizer, c.conditioner
    c.conditioner = dict(name="Spatial", field="segmentation", classes=4, factor=4, channels=4)
    # It reads neither a vector nor tokens; without coordinates it may be larger than trained.
    c.model.update(vector=0, transformer=False, coordinates=False)
    c.objective.drop = 0.0
    c.sampler = dict(solver="dpmpp_2m", steps=12)
    c.log.update(evaluate=300, save=300)
    return c
