"""Inpainting on `shapes` by a model that is trained for it, in latents of configs/demo_autoencoder.py, on two cores.

    python train.py --config configs/demo_inpaint.py --workdir runs/demo/inpaint
    python -m ldm_jax.evaluate --workdir runs/demo/inpaint --metrics condition --n 256
    python sample.py --workdir runs/demo/inpaint --task inpaint --image a.png --mask hole.png

The reduced twin of configs/inpainting_big.py: 4 + 4 + 1 channels, all kinds of masks. docs/paper_tasks.md has its
figures.
"""

from configs import demo


def get_config():
    c = demo.get_config()
    c.steps = 1_000
    c.optimizer.update(demo.TWINS)
    c.data.update(batch=32, holes=("thick", "medium", "thin", "boxes", "outpaint"), blank=-1.0)
    del c.tokenizer, c.conditioner
    c.conditioner = dict(
        name="Combine",
        parts=(
            dict(name="Spatial", field="masked"),
            dict(name="Spatial", field="hole", factor=4, signed=True),
        ),
    )
    c.model.update(vector=0, transformer=False)  # it reads neither a vector nor tokens
    c.objective.drop = 0.0
    c.sampler = dict(solver="dpmpp_2m", steps=12)
    c.log.update(evaluate=500, save=500)
    return c
