"""`shapes` without conditions, in the latents of configs/demo_autoencoder.py, on two CPU cores.

    python train.py --config configs/demo_latents.py --workdir runs/demo/latent_model
    python -m ldm_jax.evaluate --workdir runs/demo/latent_model --metrics fid,prdc --features shapes:FILE

The twin of configs/celebahq_f4.py, on straight paths as configs/demo.py. `python -m ldm_jax.benchmark families`
compares it with configs/demo_pixels.py.
"""

from configs import demo


def get_config():
    c = demo.get_config()
    c.steps = 600
    c.optimizer.update(demo.TWINS)
    del c.data.source.caption, c.tokenizer, c.conditioner
    c.model.update(vector=0, transformer=False)  # it reads neither a vector nor tokens
    c.objective.drop = 0.0
    c.sampler = dict(solver="dpmpp_2m", steps=16)
    c.log.update(evaluate=300, save=300)
    return c
