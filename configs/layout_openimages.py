"""Boxes with names to pictures of 256 px, on OpenImages: U-Net 246,277,379, text encoder 54,656,000, in f4 latents.

    python train.py --config configs/vq_f4.py --workdir runs/vq_f4 --config.data.source.path=/data/openimages
    python train.py --config configs/layout_openimages.py --workdir runs/layout

CompVis' layout2img-openimages256: up to 30 objects and the window that is shown, as 92 tokens of a vocabulary of 8192
(`ldm_jax/data/layout.py`), are read by a transformer of 16 layers that is trained along; betas 0.0015 to 0.0205, l1
loss, batch 24, 2e-6 a sample. Its class of data is not in the repository; pictures with 2 to 30 boxes of at least 1e-4
of the picture are those of taming-transformers. Published: FID 32.02 with 200 DDIM steps. Not trained here;
configs/demo_layout.py is the reduced twin that is.
"""

from configs import inpainting_big


def get_config():
    c = inpainting_big.get_config()
    c.steps = 4_400_000
    c.data = dict(
        source=dict(name="open_images.open_images", path="data/open_images", split="train"),
        validation=dict(split="validation"),
        batch=24,
        size=256,
        crop="random",
        flip=True,
        workers=8,
        layout=dict(classes=(("group", 2), ("label", 601)), objects=30, vocab=8192, window=True),
    )
    c.codec.run = "runs/vq_f4"
    del c.model, c.conditioner
    c.model = dict(
        name="unet.UNet",
        width=128,
        mults=(1, 2, 3, 4),
        blocks=2,
        attention=(0, 3, 3, 3),
        middle=3,
        head_dim=32,
    )
    c.conditioner = dict(name="Text", field="layout", width=512, layers=16, heads=8, head_dim=64)
    c.optimizer.update(lr=4.8e-5, warmup=0)
    c.sampler.steps = 200
    return c
