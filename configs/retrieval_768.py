"""Pictures of 768 px given their neighbours' CLIP embeddings, U-Net 1,335,480,400 parameters in f16 latents.

    python -m ldm_jax.neighbours --images /data/pictures --clip clip-vit-large-patch14 --out /data/neighbours.npz
    python train.py --config configs/kl_f16.py --workdir runs/kl_f16 --config.data.source.path=/data/openimages
    python train.py --config configs/retrieval_768.py --workdir runs/retrieval \
        --config.data.source.path=/data/pictures --config.data.source.index=/data/neighbours.npz

CompVis' retrieval-augmented-diffusion/768x768: 20 neighbours are tokens of width 768 that cross-attention reads as they
are; betas 0.0015 to 0.015. The original searches 20 M patches of OpenImages with ScaNN; here the training pictures
themselves are searched exactly. Neither its data nor its batch are in the repository. In code a prompt's CLIP
embedding may stand among the neighbours'. Not trained here; configs/demo_retrieval.py is its twin.
"""

from configs import inpainting_big


def get_config():
    c = inpainting_big.get_config()
    c.steps = 500_000
    del c.data.holes, c.data.blank
    c.data.source = dict(
        name="neighbours.folder",
        path="data/pictures",
        index="data/neighbours.npz",
        neighbours=20,
        split="train",
    )
    c.data.update(batch=64, size=768)
    c.codec.run = "runs/kl_f16"
    del c.model, c.conditioner
    c.model = dict(
        name="unet.UNet",
        width=448,
        mults=(1, 2, 3, 4),
        blocks=2,
        attention=(1, 1, 1, 0),
        middle=1,
        head_dim=32,
        dtype="bfloat16",
        remat=True,
    )
    c.conditioner = dict(name="Tokens", field="neighbours", count=20, width=768)
    c.path.beta_end = 0.015
    c.objective.update(kind="l2", drop=0.1)
    c.optimizer.update(lr=1e-4, warmup=10_000)
    c.mesh.update(data=1, fsdp=-1)
    return c
