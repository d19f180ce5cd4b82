"""DiT under the names of its authors' files and of diffusers' `DiTTransformer2DModel`.

    tensors = pickles.read("DiT-XL-2-256x256.pt")
    params = table.load(dit.ORIGINAL, dit.shapes(network, classes, channels), dit.original(tensors))

Parameters are {"network", "conditioner"}, as those of a `LatentDiffusion` with a `DiT` and a `Label`: the files have
the classes beside the rest. Both kinds keep what follows from the rest: the authors' files the fixed positions, and
those of diffusers a copy of the embeddings in every block. That is looked at, and left out.

diffusers' model is not quite the original: the sinusoids of time have frequencies of their own (i / 127 where the
authors have i / 128), and the second norm of a block another epsilon. Its files have the weights of the authors' model,
and so do we compute what that computes.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.models import dit
from ldm_jax.nn import conv, embeddings
from ldm_jax.types import Cond
from ldm_jax.weights import configs
from ldm_jax.weights.table import Layout, Mismatch, Row, Table, under

ORIGINAL: Table = (
    Row("network/patches", "x_embedder.proj"),
    Row("network/time/in", "t_embedder.mlp.0"),
    Row("network/time/out", "t_embedder.mlp.2"),
    Row("conditioner/embedding", "y_embedder.embedding_table"),
    *under(
        "network/block_{i}",
        "blocks.{i}",
        (
            *(Row(f"attn/{n}", "attn.qkv", Layout(part=i, of=3)) for i, n in enumerate("qkv")),
            Row("attn/out", "attn.proj"),
            Row("ff/in", "mlp.fc1"),
            Row("ff/out", "mlp.fc2"),
            Row("modulation", "adaLN_modulation.1"),
        ),
    ),
    Row("network/last/modulation", "final_layer.adaLN_modulation.1"),
    Row("network/last/linear", "final_layer.linear"),
)
EMBEDDERS = "transformer_blocks.{i}.norm1.emb."
FIRST = EMBEDDERS.format(i=0)
DIFFUSERS: Table = (
    Row("network/patches", "pos_embed.proj"),
    Row("network/time/in", f"{FIRST}timestep_embedder.linear_1"),
    Row("network/time/out", f"{FIRST}timestep_embedder.linear_2"),
    Row("conditioner/embedding", f"{FIRST}class_embedder.embedding_table"),
    *under(
        "network/block_{i}",
        "transformer_blocks.{i}",
        (
            Row("attn/out", "attn1.to_out.0"),
            Row("attn/{qkv}", "attn1.to_{qkv}"),
            Row("ff/in", "ff.net.0.proj"),
            Row("ff/out", "ff.net.2"),
            Row("modulation", "norm1.linear"),
        ),
    ),
    Row("network/last/modulation", "proj_out_1"),
    Row("network/last/linear", "proj_out_2"),
)
POSITIONS = "pos_embed"
CLOSE = 1e-5  # of what is only kept for convenience, to what it is a copy of


def named(tensors: Mapping[str, Any]) -> tuple[Table, dict[str, Any]]:
    """The table by whose names these tensors are, and what it says of them: without copies and positions.

    Raises:
      Mismatch: the tensors of another network, or what `original` and `shared` refuse.
    """
    if theirs(ORIGINAL, "network/patches") in tensors:
        return ORIGINAL, original(tensors)
    if theirs(DIFFUSERS, "network/patches") in tensors:
        return DIFFUSERS, shared(tensors)
    raise Mismatch(
        f"these {len(tensors)} tensors, such as {min(tensors, default=None)!r}, are those of no DiT; give a file of "
        "facebookresearch/DiT or of diffusers' DiTTransformer2DModel"
    )


def theirs(rows: Table, module: str) -> str:
    """What the kernel, or the embeddings, of a module of ours are called."""
    return f"{next(row.theirs for row in rows if row.ours == module)}.weight"


def original(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of an authors' file without the positions.

    Raises:
      Mismatch: positions that are not those of `embeddings.places`.
    """
    rest = {name: tensor for name, tensor in tensors.items() if name != POSITIONS}
    if POSITIONS in tensors:
        theirs = np.asarray(tensors[POSITIONS], np.float32)[0]
        side = math.isqrt(len(theirs))
        ours = embeddings.places((side, side), theirs.shape[-1]).reshape(side * side, -1)
        if ours.shape != theirs.shape or np.abs(ours - theirs).max() > CLOSE:
            raise Mismatch(
                f"the positions {POSITIONS!r} {theirs.shape} are not the fixed sinusoids of a square grid; "
                "a DiT of other positions cannot be loaded"
            )
    return rest


def with_positions(tensors: Mapping[str, Any], side: int) -> dict[str, Any]:
    """The inverse, for latents of `side` x `side` patches."""
    width = tensors["x_embedder.proj.bias"].shape[0]
    places = embeddings.places((side, side), width).reshape(1, side * side, width)
    return {POSITIONS: places, **tensors}


def shared(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a diffusers file without the embeddings of all blocks but the first.

    Raises:
      Mismatch: a block with embeddings of its own.
    """
    firsts = [name.removeprefix(FIRST) for name in tensors if name.startswith(FIRST)]
    copies = {
        name: part
        for name in tensors
        for part in firsts
        if name.endswith(f".norm1.emb.{part}") and not name.startswith(FIRST)
    }
    kept = {part: np.asarray(tensors[FIRST + part]) for part in firsts}
    for name, part in copies.items():
        one = np.asarray(tensors[name])
        if one.shape != kept[part].shape or np.abs(one - kept[part]).max() > CLOSE:
            raise Mismatch(
                f"{name!r} is not the same as {FIRST + part!r}; a DiT whose blocks have embeddings of their own "
                "cannot be loaded"
            )
    return {name: tensor for name, tensor in tensors.items() if name not in copies}


def spread(tensors: Mapping[str, Any], depth: int) -> dict[str, Any]:
    """The inverse, for `depth` blocks."""
    firsts = {name.removeprefix(FIRST): t for name, t in tensors.items() if name.startswith(FIRST)}
    copies = {
        EMBEDDERS.format(i=i) + part: t for i in range(1, depth) for part, t in firsts.items()
    }
    return {**tensors, **copies}


TAKES = dict(
    num_attention_heads=16,
    attention_head_dim=72,
    in_channels=4,
    out_channels=None,
    num_layers=28,
    patch_size=2,
    num_embeds_ada_norm=1000,
)
ONLY = dict(
    attention_bias=(True,),
    activation_fn=("gelu-approximate",),
    norm_type=("ada_norm_zero",),
    norm_elementwise_affine=(False,),
    upcast_attention=(False,),
)
IDLE = ("sample_size", "norm_num_groups", "norm_eps", "dropout")


def from_config(config: Mapping[str, Any], dtype: Any = jnp.float32) -> tuple[dit.DiT, int]:
    """The network of a `DiTTransformer2DModel`'s config, and its number of classes without the null one.

    Raises:
      ValueError: the config asks for what we lack.
    """
    given = configs.read(config, "DiTTransformer2DModel", TAKES, ONLY, IDLE)
    channels, out = given["in_channels"], given["out_channels"] or given["in_channels"]
    if out not in (channels, 2 * channels):
        raise ValueError(
            f"the config of this DiTTransformer2DModel has in_channels={channels} and out_channels={out}; we have as "
            "many, or twice as many with a learned variance, so such a model cannot be loaded"
        )
    network = dit.DiT(
        width=given["num_attention_heads"] * given["attention_head_dim"],
        depth=given["num_layers"],
        heads=given["num_attention_heads"],
        patch=given["patch_size"],
        variance=out != channels,
        dtype=dtype,
    )
    return network, given["num_embeds_ada_norm"]


def to_config(network: dit.DiT, classes: int, channels: int, side: int) -> dict[str, Any]:
    """The inverse, for latents of `side` x `side` and `channels`.

    Raises:
      ValueError: a network that diffusers has not.
    """
    if network.ratio != 4 or not isinstance(network.patch, int) or network.out_channels:
        raise ValueError(
            f"diffusers has no such DiT: ratio={network.ratio} must be 4, patch={network.patch} one number, "
            f"out_channels={network.out_channels} None"
        )
    return dict(
        _class_name="DiTTransformer2DModel",
        num_attention_heads=network.heads,
        attention_head_dim=network.width // network.heads,
        in_channels=channels,
        out_channels=channels * (2 if network.variance else 1),
        num_layers=network.depth,
        patch_size=network.patch,
        num_embeds_ada_norm=classes,
        sample_size=side,
    )


def shapes(network: dit.DiT, classes: int, channels: int) -> dict[str, Any]:
    """Those of the parameters {"network", "conditioner"} for latents of so many channels, for `table.load`."""
    x = jax.ShapeDtypeStruct((1, *(conv.per_axis(network.patch, 2)), channels), jnp.float32)
    t = jax.ShapeDtypeStruct((1,), jnp.float32)
    vector = jax.ShapeDtypeStruct((1, network.width), jnp.float32)
    made = jax.eval_shape(network.init, jax.random.key(0), x, t, Cond(vector=vector))
    rows = jax.ShapeDtypeStruct((classes + 1, network.width), jnp.float32)
    return {"network": made["params"], "conditioner": {"embedding": {"embedding": rows}}}
