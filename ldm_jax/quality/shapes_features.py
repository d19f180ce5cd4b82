"""The feature network of `shapes`: trained on the embedded data in a minute or two (`weights.shapes_classifier`)."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, UInt8
from tqdm import tqdm

from ldm_jax.data import tfds_source, transforms
from ldm_jax.data.shapes.vocabulary import World
from ldm_jax.models.shapes_classifier import Answers
from ldm_jax.training import sharding
from ldm_jax.types import Params
from ldm_jax.weights import shapes_classifier

STEPS, BATCH, RATE = 600, 128, 3e-3
# Half of the pictures with combinations that training pictures lack: a judge should know them, a generator should not.
TRAINING, RARE, OFTEN = "train[:50%]", "unseen[:50%]", 6


class Examples(NamedTuple):
    """Pictures and what is to be said of them; the kinds are the colours, then the shapes."""

    x: UInt8[np.ndarray, "n h w 3"]
    pair: Int[np.ndarray, " n"]
    present: Float[np.ndarray, "n k"]
    centre: Float[np.ndarray, "n k 2"]
    alone: Float[
        np.ndarray, "n k"
    ]  # 1 where just one object is of that kind, so that it has one place
    count: Int[np.ndarray, " n"]  # of objects, less one


def examples(world: World, data_dir: str | Path, split: str) -> Examples:
    """A split of the prepared data set.

    Raises:
      FileNotFoundError: it is not prepared; the message has the command that does it.
    """
    source = tfds_source.tfds(f"shapes/{world.name}", data_dir, split)
    source = source.only(("image", "label", "boxes"))
    kinds, rows = len(world.colours) + len(world.shapes), []
    for i in tqdm(range(len(source)), unit="picture", desc=f"reading {split}", mininterval=1.0):
        record = source[i]
        boxes = {name: np.asarray(values) for name, values in record["boxes"].items()}
        of = np.stack([boxes["colour"], boxes["shape"] + len(world.colours)])  # kinds, objects
        hits = np.zeros(kinds)
        np.add.at(hits, of.ravel(), 1)
        centre = np.zeros((kinds, 2))
        centre[of] = (boxes["bbox"][:, :2] + boxes["bbox"][:, 2:]) / 2
        x = np.asarray(transforms.decode(record["image"]))
        rows.append((x, record["label"], hits > 0, centre, hits == 1, of.shape[1] - 1))
    x, pair, present, centre, alone, count = zip(*rows, strict=True)
    reals = (np.stack(values).astype(np.float32) for values in (present, centre, alone))
    return Examples(np.stack(x), np.array(pair, np.int32), *reals, np.array(count, np.int32))


def training(world: World, data_dir: str | Path) -> Examples:
    """Pictures to learn from; each with a rare combination counts `OFTEN` times."""
    common, rare = (examples(world, data_dir, split) for split in (TRAINING, RARE))
    return Examples(*(np.concatenate([a, *[b] * OFTEN]) for a, b in zip(common, rare, strict=True)))


def loss(said: Answers, of: Any) -> Float[Array, ""]:
    """Cross-entropies of the four questions, and the squared distance of the places in units of 1/20 of a side."""
    whole = optax.softmax_cross_entropy_with_integer_labels
    away = jnp.square(20 * (said.centre - of.centre)).sum(-1) * of.alone
    return (
        whole(said.activations.logits, of.pair).mean()
        + whole(said.count, of.count).mean()
        + optax.sigmoid_binary_cross_entropy(said.present, of.present).sum(-1).mean()
        + away.sum(-1).mean()
    )


def train(world: World, of: Examples, steps: int = STEPS, seed: int = 0) -> Params:
    """The variables of a trained network."""
    model, mesh = shapes_classifier.network(world), sharding.make_mesh()
    params = model.init(jax.random.key(seed), jnp.zeros((1, *of.x.shape[1:])))
    optimizer = optax.adamw(optax.cosine_onecycle_schedule(steps, RATE))
    params, state = jax.device_put((params, optimizer.init(params)), sharding.replicated(mesh))
    size = sharding.round_up(BATCH, mesh)

    @jax.jit
    def step(params, state, batch):
        def value(params):
            return loss(model.apply(params, batch.x.astype(jnp.float32)), batch)

        now, grads = jax.value_and_grad(value)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, now

    rng = np.random.default_rng(seed)
    with tqdm(total=steps, unit="step", desc="training", mininterval=1.0) as bar:
        for i in range(steps):
            rows = rng.integers(0, len(of.x), size)
            batch = sharding.place(mesh, Examples(*(field[rows] for field in of)))
            params, state, now = step(params, state, batch)
            if i % 50 == 0:
                bar.set_postfix_str(f"loss {float(now):.3f}", refresh=False)
            bar.update()
    return params


def accuracy(world: World, params: Params, of: Examples, batch: int = 250) -> dict[str, float]:
    """How often all kinds are told rightly, and how often the number; the mean error of the places in pixels."""
    answer = jax.jit(
        lambda x: shapes_classifier.network(world).apply(params, x.astype(jnp.float32))
    )
    said = [answer(of.x[i : i + batch]) for i in range(0, len(of.x), batch)]
    present, centre, count = (
        np.concatenate([np.asarray(getattr(part, name)) for part in said])
        for name in ("present", "centre", "count")
    )
    away = np.linalg.norm(centre - of.centre, axis=-1) * world.side
    return {
        "kinds": float(((present > 0) == (of.present > 0)).all(1).mean()),
        "count": float((count.argmax(1) == of.count).mean()),
        "pixels": float((away * of.alone).sum() / of.alone.sum()),
    }
