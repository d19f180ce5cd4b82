"""Families of generative models on `shapes`, each trained for the same time: how good their pictures are, and how fast.

    python -m ldm_jax.train_features --data_dir runs/demo/data --out runs/demo/features.safetensors
    python -m ldm_jax.benchmark families --data_dir runs/demo/data --features shapes:runs/demo/features.safetensors \
        --seconds 240 --workdir runs/families --out families.json

    VAE       samples of its prior are decoded
    GAN       the same decoder, against the discriminator of the first stage
    pixels    configs/demo_pixels.py
    latents   configs/demo_autoencoder.py for a share --first_stage of the time, then configs/demo_latents.py

None is told what a picture shows. All optimizers (Muon, and Adam for the GAN) run at a constant rate, and a
power-function average of the parameters (of a tenth of the steps) draws, so that no schedule has to know how many steps
there will be. Seconds are those of the CPU, all threads together, where it is the device: what else a machine does does
not count, nor does compiling.
"""

import contextlib
import functools
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from tqdm import tqdm

from ldm_jax import build, markdown, media, tree
from ldm_jax.build import held_out
from ldm_jax.build.untrained import read
from ldm_jax.measure import comparison, timing
from ldm_jax.measure.gan import gan_loss
from ldm_jax.measure.vae import vae_loss
from ldm_jax.models import autoencoder, discriminator
from ldm_jax.quality import extractors, features, pictures, scores
from ldm_jax.training import averages, checkpoints, optimizer, sharding, step
from ldm_jax.training.run import Run
from ldm_jax.types import TrainState

FLAGS = flags.FlagValues()
flags.DEFINE_string("data_dir", "runs/demo/data", "where `shapes` is", flag_values=FLAGS)
flags.DEFINE_string("features", None, "shapes:FILE, of train_features", flag_values=FLAGS)
flags.DEFINE_float("seconds", 240.0, "of training, a family", 1.0, flag_values=FLAGS)
flags.DEFINE_float(
    "first_stage", 0.3, "the autoencoder's share of them", 0.01, 0.99, flag_values=FLAGS
)
flags.DEFINE_integer("n", 1000, "samples that are judged", lower_bound=65, flag_values=FLAGS)
flags.DEFINE_list("only", [], "some of the families", flag_values=FLAGS)
flags.DEFINE_string("workdir", None, "where to keep the runs", flag_values=FLAGS)
flags.DEFINE_string("out", None, "a JSON file; samples are beside it, as .png", flag_values=FLAGS)

# Of VAE and GAN: the first stage of the demo, a level deeper and with more channels of latents.
NETWORK = dict(width=16, mults=(1, 2, 4, 8), blocks=1, z_channels=16, embed=16, groups=4)
LATENT = (4, 4, 16)
SHARE = 0.1  # sigma_rel of the average
BATCH, AT_ONCE, SHOWN = 32, 100, 10
METRICS = ("fid", "prdc")

Draw = Callable[[int, int], Iterator[np.ndarray]]  # (n, seed) -> batches of pictures in [-1, 1]


class Made(NamedTuple):
    """A family's model, trained."""

    draw: Draw
    parameters: int  # that draw
    steps: int
    seconds: float
    images: int  # that it was trained on
    before: float = 0.0  # seconds of a first stage


class Asked(NamedTuple):
    extractor: extractors.Extractor
    names: list[str]
    workdir: str | None


def prepare() -> Asked:
    """What the flags ask for.

    Raises:
      ValueError, FileNotFoundError: no features, no data, no configs, or a family that is not known.
    """
    if FLAGS.features is None:
        raise ValueError(
            "--features is missing; it is shapes:FILE, of python -m ldm_jax.train_features"
        )
    names = FLAGS.only or list(FAMILIES)
    for name in names:
        if name not in FAMILIES:
            raise ValueError(f"there is no family {name!r}; choose among {list(FAMILIES)}")
    for split in ("validation", f"train[:{FLAGS.n}]"):
        held_out.validation(config_of("demo_pixels", split), FLAGS.n)
    return Asked(
        extractors.named(FLAGS.features, (), "none", sharding.make_mesh()), names, FLAGS.workdir
    )


def main(asked: Asked) -> None:
    """Trains, draws and judges; prints a table, and writes what --out names, after each family."""
    rows, lines = [], {}
    with contextlib.ExitStack() as stack:
        folder = asked.workdir or stack.enter_context(tempfile.TemporaryDirectory())
        for row, line in measure(asked, Path(folder)):
            rows.append(row)
            lines[row["family"]] = line
            if FLAGS.out:
                write(Path(FLAGS.out), asked, rows, lines)
    print(table(rows))


def write(
    path: Path, asked: Asked, rows: list[dict[str, Any]], lines: dict[str, np.ndarray]
) -> None:
    """The figures, and a sheet with a line of pictures for each family beside them."""
    result = {
        "command": " ".join(["python -m ldm_jax.benchmark", *sys.argv[1:]]),
        "clock": comparison.clock(),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
        "features_sha256": asked.extractor.digest,
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    said = [text for name in lines for text in (name, *[""] * (SHOWN - 1))]
    sheet = media.grid(np.concatenate(list(lines.values())), SHOWN, said, scale=2)
    media.save_png(path.with_suffix(".png"), sheet)


def measure(asked: Asked, folder: Path) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """A row of figures and a line of pictures for the real ones, and for each family."""
    mesh, n = sharding.make_mesh(), FLAGS.n
    parts, limits = scores.parts(METRICS), scores.Limits(asked.extractor, 0)

    def gathered(of):
        return features.gather(asked.extractor, of, parts, mesh, AT_ONCE)

    def real(split):
        of = held_out.validation(config_of("demo_pixels", split), n).pictures()
        return pictures.of_array(f"real pictures ({split})", pictures.stacked(of, 0, n))

    reference, others = gathered(real("validation")), real(f"train[:{n}]")
    found = scores.of_features(METRICS, reference, gathered(others), limits)
    yield {"family": "real"} | found, pictures.stacked(others, 0, SHOWN)
    for name in asked.names:
        made = FAMILIES[name](folder / name)
        next(made.draw(min(AT_ONCE, n), 0))  # compiles
        began = timing.now()
        drawn = np.concatenate([media.to_uint8(part) for part in made.draw(n, 0)])
        spent = timing.now() - began
        told = dict(
            parameters=made.parameters,
            seconds=made.seconds + made.before,
            first_stage_seconds=made.before,
            steps=made.steps,
            train_images_per_second=made.images / made.seconds,
            sample_images_per_second=n / spent,
        )
        of = gathered(pictures.of_array(name, drawn))
        found = scores.of_features(METRICS, reference, of, limits)
        yield {"family": name} | told | found, drawn[:SHOWN]


def config_of(name: str, validation: str = "validation") -> Any:
    """A config of the demo on the data of the flags, with the optimizer of all families.

    Raises:
      FileNotFoundError: no such file; the benchmark runs in the checkout.
    """
    config = read(Path("configs", f"{name}.py"))
    with config.ignore_type():
        config.data.source.data_dir = FLAGS.data_dir
        config.data.validation = dict(split=validation)
        config.optimizer.update(decay="constant", ema=dict(power=(SHARE,)))
    return config


def trained(run: Run, name: str, seconds: float) -> tuple[TrainState, int, float]:
    """The state after so many seconds of steps, how many steps, and the seconds exactly."""
    replicated = sharding.replicated(run.mesh)
    init = lambda key: step.init_state(run.init(key), run.optimizer, run.ema)  # noqa: E731
    state = jax.jit(init, out_shardings=replicated)(jax.random.key(run.seed))
    key = jax.jit(lambda: jax.random.key(run.seed + 1), out_shardings=replicated)()
    take = jax.jit(
        step.make_train_step(run.loss, run.optimizer, run.ema),
        donate_argnums=0,
        out_shardings=replicated,
    )
    with contextlib.closing(run.batches(0)) as batches:
        batch = sharding.place(run.mesh, next(batches))
        take = take.lower(state, run.frozen, batch, key).compile()
        began, steps = timing.now(), 0
        bar = tqdm(total=round(seconds), unit="s", desc=name, mininterval=1.0)
        with bar:
            while True:
                state, told = take(state, run.frozen, batch, key)
                steps += 1
                if steps % 4 == 0:
                    jax.block_until_ready(told)
                    spent = timing.now() - began
                    bar.n = round(min(spent, seconds))
                    bar.set_postfix_str(f"step {steps}, loss {float(told['loss']):.3g}")
                    if spent >= seconds:
                        return state, steps, spent
                batch = sharding.place(run.mesh, next(batches))


def of_run(config: Any, folder: Path, name: str, seconds: float) -> tuple[Run, int, float]:
    """Trains a config's run for so many seconds and keeps its checkpoint."""
    run = build.run(config, folder)
    state, steps, spent = trained(run, name, seconds)
    with contextlib.closing(checkpoints.Checkpoints(folder)) as saved:
        saved.save(state)
        saved.wait()
    return run, steps, spent


def diffusion(config: Any, folder: Path, name: str, seconds: float) -> Made:
    """A diffusion model by a config of the demo."""
    run, steps, spent = of_run(config, folder, name, seconds)
    pipeline = build.pipeline(folder)
    draw = pipeline.drawer(build.sampling(folder, pipeline), AT_ONCE)

    def drawn(n, seed):
        for part in draw(pipeline.unconditional(n), [seed + i for i in range(n)]):
            yield part.x

    held = (pipeline.params, pipeline.arrays)
    return Made(drawn, tree.count(held), steps, spent, steps * run.batch)


def pixels(folder: Path) -> Made:
    return diffusion(config_of("demo_pixels"), folder, "pixels", FLAGS.seconds)


def latents(folder: Path) -> Made:
    first = FLAGS.first_stage * FLAGS.seconds
    *_, spent = of_run(
        config_of("demo_autoencoder"), folder / "autoencoder", "latents: autoencoder", first
    )
    config = config_of("demo_latents")
    config.codec.run = str(folder / "autoencoder")
    made = diffusion(config, folder / "model", "latents", FLAGS.seconds - spent)
    return made._replace(before=spent)


def decoded(name: str, folder: Path) -> Made:
    """The decoder of a latent vector, as a VAE's or as a GAN's."""
    model = autoencoder.KLAutoencoder(**NETWORK)
    judge = discriminator.PatchGAN(width=32, norm="group", groups=8)
    config = config_of("demo_autoencoder")
    config.data.batch = BATCH
    x, z = jnp.zeros((1, 32, 32, 3)), jnp.zeros((1, *LATENT))

    def init(key):
        a, b = jax.random.split(key)
        if name == "VAE":
            return {"gen": model.init(a, x, b)["params"]}
        gen = model.init(a, z, method="decode")["params"]
        return {"gen": gen, "disc": judge.init(b, x)["params"]}

    run = build.run(config, folder)._replace(init=init, batch=BATCH)
    if name == "VAE":
        run = run._replace(loss=vae_loss(model))
    else:
        tx = optimizer.adamw(steps=1, lr=1e-3, b1=0.0, b2=0.99, weight_decay=0.0)
        run = run._replace(loss=gan_loss(model, judge, LATENT), optimizer=tx)
    state, steps, spent = trained(run, name, FLAGS.seconds)
    params = averages.first(run.ema, state.ema)["gen"]
    decode = jax.jit(functools.partial(model.apply, method="decode"))

    def drawn(n, seed):
        size = sharding.round_up(AT_ONCE, run.mesh)
        rng = np.random.default_rng(seed)
        for start in range(0, n, size):
            z = rng.standard_normal((size, *LATENT), np.float32)
            y = decode({"params": params}, sharding.spread(run.mesh, z))
            yield np.asarray(y)[: n - start]

    draws = {k: v for k, v in params.items() if k in ("decoder", "post_quant_conv")}
    return Made(drawn, tree.count(draws), steps, spent, steps * BATCH)


FAMILIES: dict[str, Callable[[Path], Made]] = {
    "VAE": functools.partial(decoded, "VAE"),
    "GAN": functools.partial(decoded, "GAN"),
    "pixels": pixels,
    "latents": latents,
}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as people read them."""
    lines = []
    for row in rows:
        cells = [row["family"]]
        if "steps" in row:
            cells += [f"{row['parameters']:,}", str(row["steps"])]
            cells += [f"{row[f'{k}_images_per_second']:.4g}" for k in ("train", "sample")]
        else:
            cells += [""] * 4
        cells += [f"{row['fid']:.2f}", f"{row['precision']:.3f}", f"{row['recall']:.3f}"]
        lines.append(cells)
    head = ("family", "parameters that draw", "steps", "training images/s", "sampling images/s")
    return markdown.table((*head, "FID", "precision", "recall"), lines)
