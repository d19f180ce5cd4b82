"""Super-resolution on `shapes`: 8x8 to 32x32 pixels, in the latents of configs/demo_autoencoder.py, on two CPU cores.

    python train.py --config configs/demo_upscale.py --workdir runs/demo/upscale
    python sample.py --workdir runs/demo/upscale --task upscale --image small.png

As LDM-BSR (Rombach et al. 2022, section 4.4): the small picture has the grid of the latents and is joined to their
channels.
"""

from configs import demo


def get_config():
    c = demo.get_config()
    c.steps = 300
    c.optimizer.update(demo.TWINS)
    c.data.update(batch=32, shrink=4)
    del c.tokenizer, c.conditioner
    c.conditioner = dict(name="Spatial", field="small")
    c.model.update(vector=0, transformer=False)  # it reads neither a vector nor tokens
    c.objective.drop = 0.0
    c.sampler = dict(solver="dpmpp_2m", steps=12)
    c.log.update(evaluate=150, save=150)
    return c
