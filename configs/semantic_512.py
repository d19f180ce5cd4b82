"""Maps of classes to pictures of 512 px, U-Net 215,229,315 parameters in f4 latents.

    python train.py --config configs/semantic_512.py --workdir runs/semantic512 \
        --config.data.source.path=/data/landscapes --config.data.source.maps=/data/landscape_maps
    python sample.py --workdir runs/semantic512 --task semantic --map map.png

CompVis' semantic_synthesis512; all but size and batch as in configs/semantic_256.py. The original cuts 512 px at random
out of pictures of 768; here a window is the largest that fits, so give pictures of about that size. Not trained here.
"""

from configs import semantic_256


def get_config():
    c = semantic_256.get_config()
    c.data.update(size=512, batch=8)
    c.optimizer.lr = 8e-6
    return c
