"""`shapes` by the features of their nearest neighbours, in latents of configs/demo_autoencoder.py, on two CPU cores.

    python -m ldm_jax.train_features --data_dir runs/demo/data --out runs/demo/features.safetensors
    python -m ldm_jax.neighbours --dataset shapes/simple --data_dir runs/demo/data --also validation --k 4 \
        --features shapes:runs/demo/features.safetensors --out runs/demo/neighbours.npz
    python train.py --config configs/demo_retrieval.py --workdir runs/demo/retrieval
    python -m ldm_jax.evaluate --workdir runs/demo/retrieval --metrics condition --n 256
    python sample.py --workdir runs/demo/retrieval --examples a.png --features shapes:runs/demo/features.safetensors

The reduced twin of configs/retrieval_768.py: four neighbours are tokens of 64 features that cross-attention reads.
docs/paper_tasks.md has its figures.
"""

from configs import demo


def get_config():
    c = demo.get_config()
    c.steps = 500
    c.optimizer.update(demo.TWINS)
    c.data.source = dict(
        name="neighbours.tfds",
        dataset="shapes/simple",
        data_dir="runs/demo/data",
        split="train",
        caption="caption",
        index="runs/demo/neighbours.npz",
        neighbours=4,
    )
    c.data.batch = 32
    del c.tokenizer, c.conditioner
    c.conditioner = dict(name="Tokens", field="neighbours", count=4, width=64, scale=8.0, pool=True)
    c.model.vector = 64
    c.sampler.guidance = 3.0
    c.log.update(evaluate=250, save=250)
    return c
