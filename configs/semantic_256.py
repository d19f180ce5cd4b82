"""Maps of classes to pictures of 256 px, U-Net 215,229,315 parameters in f4 latents.

    python train.py --config configs/vq_f4.py --workdir runs/vq_f4 --config.data.source.path=/data/openimages
    python train.py --config configs/semantic_256.py --workdir runs/semantic \
        --config.data.source.path=/data/landscapes --config.data.source.maps=/data/landscape_maps
    python sample.py --workdir runs/semantic --task semantic --map map.png

CompVis' semantic_synthesis256: the map of 182 classes (those of COCO-Stuff), one-hot, is halved twice and brought to
three channels by a 1x1 convolution that is trained along (SpatialRescaler), and joined to the noise; betas 0.0015 to
0.0205, l1 loss. Its attention at factors 8, 16 and 32 is of levels that the U-Net lacks, so that the middle alone
attends. Maps are grey or palette PNG files of the pictures' names; 255 is no class. No FID is published. A larger map
than trained on is drawn convolutionally (Rombach et al. 2022, section 4.3.2): the condition is on the latents' grid,
whatever its size. Not trained here; configs/demo_semantic.py is the reduced twin that is.
"""

from configs import inpainting_big


def get_config():
    c = inpainting_big.get_config()
    c.steps = 400_000
    del c.data.holes, c.data.blank
    c.data.source = dict(
        name="maps.folder",
        path="data/landscapes",
        maps="data/landscape_maps",
        split="train",
        void=255,
    )
    c.codec.run = "runs/vq_f4"
    c.model.update(width=128, mults=(1, 4, 8), attention=(), resample_blocks=False)
    del c.conditioner
    c.conditioner = dict(name="Spatial", field="segmentation", classes=182, factor=4, channels=3)
    c.optimizer.warmup = 0
    return c
