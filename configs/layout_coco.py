"""Boxes with names to pictures of 256 px, on COCO: U-Net 246,277,379, text encoder 54,656,000, in f4 latents.

    python train.py --config configs/layout_coco.py --workdir runs/layout_coco --config.data.source.path=/data/coco

The model of configs/layout_openimages.py on things and stuff of COCO 2017, whose 80 + 91 classes are numbered in the
order of COCO's ids. The paper fine-tunes that model on COCO (section 4.3.1) with data that are not in its repository:
FID 40.91. Not trained here.
"""

from configs import layout_openimages


def get_config():
    c = layout_openimages.get_config()
    c.steps = 140_000
    del c.data.source
    c.data.source = dict(name="coco.boxes", path="data/coco", split="train", stuff=True)
    c.data.layout.classes = (("group", 2), ("label", 171))
    return c
