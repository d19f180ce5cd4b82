"""Fine-tuning of Stable Diffusion 1.5 on captioned pictures of 512 px: the U-Net's 859,520,964 parameters are trained.

    python train.py --config configs/sd15_finetune.py --workdir runs/sd15 \
        --config.init.path=/models/stable-diffusion-v1-5 --config.data.source.path=/data/captioned
    python sample.py --workdir runs/sd15 --prompt "a painting of a lighthouse" --n 4

Needs the folder of the model as diffusers keeps it (model_index.json, safetensors) and a folder of pictures with
captions. The text encoder (123,060,480) and the autoencoder (83,653,863) stay as they are; `init.train_text_encoder`
trains the former too. The published recipe: AdamW 1e-5, a tenth of the prompts dropped. Not trained here.
"""

from ml_collections import ConfigDict


def get_config():
    c = ConfigDict()
    c.seed, c.steps = 0, 15_000
    c.data = dict(
        source=dict(name="folder.folder", path="data/captioned", split="train"),
        validation=dict(split="validation"),
        batch=32,
        size=512,
        crop="random",
        flip=True,
        workers=8,
        cached="",  # a folder of python -m ldm_jax.cache, which takes centre crops
    )
    c.init = dict(
        weights="diffusers",
        path="path/to/stable-diffusion-v1-5",
        variant="",  # "fp16": of the files' names
        config="",  # of a single file, with weights="original": see docs/pretrained.md
        tokenizers=(),  # of one, too
        dtype="bfloat16",
        remat=True,
        train_text_encoder=False,
    )
    c.objective = dict(name="diffusion", times="discrete", drop=0.1)
    c.optimizer = dict(
        name="adamw", lr=1e-5, warmup=500, weight_decay=0.01, clip=1.0, ema=0.9999, accumulate=1
    )
    c.mesh = dict(data=1, fsdp=-1, tensor=1)
    c.sharding = ((".*", "fsdp"),)
    c.sampler = dict(solver=dict(name="ddim", eta=0.0), steps=50, spacing="leading", guidance=7.5)
    c.log = dict(every=50, evaluate=1_000, save=1_000, batches=2, samples=8)
    return c
