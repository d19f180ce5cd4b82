"""Super-resolution from 64 to 256 px, U-Net 113,622,563 parameters in f4 latents, on a folder of pictures.

    python train.py --config configs/vq_f4.py --workdir runs/vq_f4 --config.data.source.path=/data/openimages
    python train.py --config configs/bsr_sr.py --workdir runs/upscale --config.data.source.path=/data/openimages
    python sample.py --workdir runs/upscale --task upscale --image small.png

CompVis' bsr_sr (LDM-BSR): the small picture is degraded as by `ldm_jax/data/degradation.py`, "bsr_light", and joined to
the noise as it is, 3 + 3 channels; betas 0.0015 to 0.0155, batch 64, 1e-6 a sample. The original's random squares are
from half of the picture's side on; here a window is the largest that fits. No figures are published. Not trained here;
configs/demo_upscale.py is the reduced twin that is, with a bicubic small picture.
"""

from configs import inpainting_big


def get_config():
    c = inpainting_big.get_config()
    del c.data.holes, c.data.blank
    c.data.source.path = "data/openimages"
    c.data.update(shrink=4, degradation="bsr_light")
    c.codec.run = "runs/vq_f4"
    c.model.update(width=160, mults=(1, 2, 2, 4), attention=(0, 0, 0, 1), resample_blocks=False)
    c.model.update(heads=None, head_dim=32)
    del c.conditioner
    c.conditioner = dict(name="Spatial", field="small")
    c.path.beta_end = 0.0155
    c.objective.kind = "l2"
    c.optimizer.warmup = 0
    return c
