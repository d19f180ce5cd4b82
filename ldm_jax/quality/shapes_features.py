"""The feature network of `shapes`: trained on the embedded data in a minute or two, kept as one safetensors file.

Its file says in its header which world it was trained on and with how many pixels, so that it is not taken for another.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, UInt8
from tqdm import tqdm

from ldm_jax.data import tfds_source, transforms
from ldm_jax.data.shapes import vocabulary
from ldm_jax.data.shapes.vocabulary import World
from ldm_jax.models.shapes_classifier import Answers, ShapesClassifier
from ldm_jax.training import sharding
from ldm_jax.types import Params
from ldm_jax.weights import files

KIND = "ldm_jax shapes features"
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


def network(world: World) -> ShapesClassifier:
    return ShapesClassifier(
        pairs=len(world.pairs), kinds=len(world.colours) + len(world.shapes), most=world.most
    )


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
    model, mesh = network(world), sharding.make_mesh()
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
    answer = jax.jit(lambda x: network(world).apply(params, x.astype(jnp.float32)))
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


def save(path: str | Path, world: World, params: Params) -> None:
    tensors = {
        f"{layer}.{leaf}": np.asarray(array)
        for layer, leaves in params["params"].items()
        for leaf, array in leaves.items()
    }
    files.write(path, tensors, {"kind": KIND, "world": world.name})


def load(path: str | Path) -> tuple[World, Params]:
    """The world and the variables of a saved network.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a file of something else, or of another version of the network.
    """
    about = files.metadata(path)
    if about.get("kind") != KIND:
        raise ValueError(
            f"{path} holds no feature network of shapes; make one with: python -m ldm_jax.train_features "
            f"--data_dir DATA --out {path}"
        )
    world = vocabulary.world(about["world"])
    example = jnp.zeros((1, world.side, world.side, 3))
    shapes = jax.eval_shape(network(world).init, jax.random.key(0), example)["params"]
    tensors = files.read(path)
    wanted = {
        f"{layer}.{leaf}": shape.shape
        for layer, leaves in shapes.items()
        for leaf, shape in leaves.items()
    }
    if wanted != {name: tensor.shape for name, tensor in tensors.items()}:
        raise ValueError(
            f"{path} holds a feature network of shapes of another version; train it anew with: "
            f"python -m ldm_jax.train_features --data_dir DATA --out {path}"
        )
    return world, {
        "params": {
            layer: {leaf: jnp.asarray(tensors[f"{layer}.{leaf}"]) for leaf in leaves}
            for layer, leaves in shapes.items()
        }
    }
