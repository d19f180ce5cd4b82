"""What latents buy: one U-Net on pixels and on latents of the same pictures, trained and sampled.

    python -m ldm_jax.benchmark latent-vs-pixel --size 64 --width 64 --batch 8
    python -m ldm_jax.benchmark sampler --help           # how fast models draw, also against diffusers
    python -m ldm_jax.benchmark train --help             # how fast models train, also against diffusers
    python -m ldm_jax.benchmark families --help          # a VAE, a GAN, diffusion on pixels and on latents

The network is the same one, with the same number of parameters, on 3-channel pixels, f4 and f8 latents. A latent train
step includes encoding, latent sampling includes decoding. Weights are random: time does not depend on them. FLOPs are
XLA's own count of the compiled programs. Rombach et al. 2022 (table 6) report 2.7x in training and 3.7x (256 px) to
4.9x (512 px) in sampling for f4 against pixels, at equal parameter counts.
"""

import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from tqdm import tqdm

from ldm_jax import cli, codec, heap, markdown, tree
from ldm_jax.diffusion import objectives, paths, samplers, solvers, targets, times, weightings
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.measure import families, sampler, train
from ldm_jax.models import autoencoder, unet
from ldm_jax.tasks import Sampling, make_sampler
from ldm_jax.training import diffusion_loss, optimizer, sharding, step

FLAGS = flags.FlagValues()
SIZE = flags.DEFINE_integer(
    "size", 64, "side of the pictures in pixels", lower_bound=32, flag_values=FLAGS
)
WIDTH = flags.DEFINE_integer(
    "width",
    64,
    "width of the U-Net and twice that of the autoencoders",
    lower_bound=16,
    flag_values=FLAGS,
)
BATCH = flags.DEFINE_integer("batch", 8, "pictures a step", lower_bound=1, flag_values=FLAGS)
STEPS = flags.DEFINE_integer("steps", 10, "solver steps", lower_bound=1, flag_values=FLAGS)
REPEATS = flags.DEFINE_integer(
    "repeats", 3, "timed runs; the median counts", lower_bound=1, flag_values=FLAGS
)
DTYPE = flags.DEFINE_string(
    "dtype", "float32", "compute dtype of the U-Net and the autoencoders", flag_values=FLAGS
)
OUT = flags.DEFINE_string("out", None, "a JSON file for the figures", flag_values=FLAGS)

SPACES = {"pixel": (), "f4": (1, 2, 4), "f8": (1, 2, 4, 4)}


def seconds(run: Callable[[], Any]) -> float:
    """The median time of a run; it has been compiled and run once before."""
    spent = []
    for _ in range(REPEATS.value):
        began = time.perf_counter()
        jax.block_until_ready(run())
        spent.append(time.perf_counter() - began)
    return float(np.median(spent))


def model_for(mults: tuple[int, ...], key: jax.Array) -> tuple[LatentDiffusion, Any]:
    """The model of one space and the arrays of its codec."""
    coder, arrays = codec.identity(), {}
    if mults:
        first = autoencoder.KLAutoencoder(
            width=max(WIDTH.value // 2, 16), mults=mults, groups=16, dtype=DTYPE.value
        )
        x = jnp.zeros((1, SIZE.value, SIZE.value, 3))
        params = jax.jit(lambda key: first.init(key, x, key)["params"])(key)
        coder, arrays = codec.autoencoder(first), {"params": params, "scale": jnp.ones(())}
    network = unet.UNet(
        width=WIDTH.value,
        mults=(1, 2, 4),
        blocks=2,
        attention=(0, 0, 1),
        middle=1,
        head_dim=32,
        groups=16,
        transformer=False,
        dtype=DTYPE.value,
    )
    return LatentDiffusion(network, None, coder, paths.rectified_flow(), targets.flow()), arrays


def measure(name: str) -> dict[str, Any]:
    """Training and sampling of one space."""
    mesh = sharding.make_mesh()
    key = jax.random.key(0)
    model, arrays = model_for(SPACES[name], key)
    shape = model.codec.shape((SIZE.value, SIZE.value, 3))
    tx = optimizer.adamw(steps=1000, lr=1e-4)

    def loss(network):
        return objectives.diffusion_loss(
            network, model.path, model.target, times.uniform(model.path), weightings.uniform()
        )

    def init(key):
        return step.init_state(model.init(key, jnp.zeros((1, *shape)), {}), tx)

    replicated = sharding.replicated(mesh)
    state = jax.jit(init, out_shardings=replicated)(key)
    arrays = jax.device_put(arrays, replicated)
    x = np.random.default_rng(0).uniform(-1, 1, (BATCH.value, SIZE.value, SIZE.value, 3))
    batch = sharding.place(mesh, {"x": x.astype(np.float32)})
    train = jax.jit(step.make_train_step(diffusion_loss.diffusion_loss(model, loss, 0.0), tx))
    train = train.lower(state, arrays, batch, key).compile()
    jax.block_until_ready(train(state, arrays, batch, key))
    train_seconds = seconds(lambda: train(state, arrays, batch, key))

    sampling = Sampling(solvers.ddim(), samplers.grid(model.path, STEPS.value))
    nothing = sharding.place(mesh, {"_": np.zeros(BATCH.value, np.int32)})
    keys = jax.random.split(key, BATCH.value)
    given = (state.params, arrays, nothing, keys, sampling.points, jnp.ones(()))
    draw = make_sampler(model, shape, sampling).lower(*given).compile()
    jax.block_until_ready(draw(*given))
    sample_seconds = seconds(lambda: draw(*given))

    def evaluate(params, z):
        return model.denoiser(params)(z, jnp.full(z.shape[:1], 0.5), model.condition(params, {})).x0

    z = jnp.zeros((1, *shape))
    forward = jax.jit(evaluate).lower(state.params, z).compile()
    devices = mesh.devices.size
    return {
        "space": name,
        "latent": "x".join(map(str, shape)),
        "parameters": tree.count(state.params),
        "train_samples_per_second": BATCH.value / train_seconds,
        "sample_images_per_second": BATCH.value / sample_seconds,
        "train_gflop_per_sample": train.cost_analysis()["flops"] * devices / BATCH.value / 1e9,
        "network_gflop_per_sample": forward.cost_analysis()["flops"] / 1e9,
    }


def latent_vs_pixel() -> None:
    rows = [measure(name) for name in tqdm(SPACES, unit="space")]
    pixel = rows[0]
    device = jax.devices()[0]
    print(
        f"\n{SIZE.value} px, U-Net width {WIDTH.value} ({pixel['parameters']:,} parameters), batch {BATCH.value}, "
        f"{STEPS.value} DDIM steps, {DTYPE.value}, {jax.device_count()} x {device.device_kind}, jax {jax.__version__}\n"
    )
    lines = []
    for row in rows:
        cells = [row["space"], row["latent"]]
        for key in ("train_samples_per_second", "sample_images_per_second"):
            cells.append(f"{row[key]:.3g} ({row[key] / pixel[key]:.1f}x)")
        cells += [f"{row['train_gflop_per_sample']:.2f}", f"{row['network_gflop_per_sample']:.2f}"]
        lines.append(cells)
    print(
        markdown.table(
            (
                "space",
                "latent",
                "train samples/s",
                "sampling images/s",
                "GFLOP train/sample",
                "GFLOP network",
            ),
            lines,
        )
    )
    if OUT.value:
        Path(OUT.value).write_text(json.dumps(rows, indent=2) + "\n")


def of_models(benchmark: Any) -> None:
    with cli.plain_errors():
        asked = benchmark.prepare()
    benchmark.main(asked)


OF_MODELS = {"families": families, "sampler": sampler, "train": train}
BENCHMARKS = {"latent-vs-pixel": latent_vs_pixel} | {
    name: functools.partial(of_models, module) for name, module in OF_MODELS.items()
}


def main(argv: list[str]) -> None:
    heap.keep()
    cli.compile_cache()
    if argv[1:2] == [] or argv[1] not in BENCHMARKS:
        cli.fail(f"name a benchmark: {sorted(BENCHMARKS)}")
    with cli.plain_errors():
        cli.nothing_more(argv[1:], "--help shows all flags")
    BENCHMARKS[argv[1]]()


if __name__ == "__main__":
    if named := OF_MODELS.get("".join(sys.argv[1:2])):
        __doc__ = named.__doc__
        cli.run(main, named.FLAGS)
    cli.run(main, FLAGS)
    sys.exit(0)
