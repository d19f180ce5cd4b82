"""From the config of a diffusion model to what `python -m ldm_jax.cache` does: which records are encoded, and how."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float
from ml_collections import ConfigDict

from ldm_jax import codec, conditioners
from ldm_jax.build import buckets, cached, diffusion, parts, pretrained, workdir
from ldm_jax.build.sections import plain
from ldm_jax.data import buckets as of_data
from ldm_jax.data import examples, latents, records
from ldm_jax.pretrained import start
from ldm_jax.training import sharding
from ldm_jax.types import Params

CONDITIONS = ("label",)  # kept wherever the data has it, as captions are


class Job(NamedTuple):
    """A split to encode."""

    plan: latents.Plan
    source: Any
    parts: tuple[tuple[of_data.Members, tuple[int, int]], ...]  # see `latents.Views`
    encode: Callable[[Float[np.ndarray, "b h w 3"]], Float[jax.Array, "b x y k"]]
    encode_texts: (
        Callable[[list[str]], dict[str, np.ndarray]] | None
    )  # where text encoders are not trained
    rows: int  # pictures and mirror images, or captions, that are encoded at once
    workers: int  # processes that read
    max_bad_rate: float

    def views(self, numbers: Sequence[int]) -> latents.Views:
        made = (latents.CAPTION, *latents.BY_CAPTION)
        fields = tuple(name for name in self.plan.fields if not name.endswith(made))
        return latents.Views(self.parts, numbers, self.plan.flips, fields)


class _Encoder(NamedTuple):
    coder: codec.Codec
    arrays: Params
    about: dict[str, Any]  # where it comes from
    fields: tuple[str, ...]  # what the model reads beside captions
    texts: Callable[[int], Callable] | None = None  # see `Job.encode_texts`, for so many at once
    of_texts: tuple[str, ...] = ()  # the fields that they make
    text: str = ""  # sha256 of the text encoders


def job(config: ConfigDict, out: str | Path, split: str, shard: int, dtype: str, rows: int) -> Job:
    """What is to be written of a split; everything that a user can get wrong is looked at.

    Args:
      shard: records of a file.
      dtype: in which moments are stored.
      rows: how many pictures are encoded at once; mirror images count.

    Raises:
      ValueError, FileNotFoundError: one sentence; also where another cache is in that folder.
    """
    if workdir.check_config(config) != "diffusion":
        raise ValueError("a cache is of a diffusion model's data; give the config of stage 2")
    size, _, flip = parts.view(config)
    changes = {} if split == "train" else parts.data(config)["validation"]
    source = parts.source(config, **changes)
    mesh = sharding.make_mesh(devices=jax.local_devices())
    found = _pretrained(config, mesh) if "init" in config else _trained(config, mesh, source, out)
    kept = [name for name in CONDITIONS if name in source.fields and name not in found.fields]
    fields = (*found.fields, *kept)
    has = (*source.fields, examples.SIZES)
    if absent := [name for name in fields if name not in has]:
        raise ValueError(
            f"{source.name} has no field {absent[0]!r}, which the model reads; its fields are {source.fields}"
        )
    x = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    shape = jax.eval_shape(found.coder.moments, found.arrays, x).shape[1:]
    captions = [latents.CAPTION] if latents.CAPTION in source.fields else []
    if found.texts and not captions:
        raise ValueError(
            f"{source.name} has no captions, which the model reads; its fields are {source.fields}"
        )
    in_buckets = split == "train" and bool(buckets.sizes(config))
    of_sizes = [(size, np.arange(len(source)))]
    if in_buckets:
        found_sizes, members = buckets.placed(config, source)
        of_sizes = [(at, np.flatnonzero(members == i)) for i, at in enumerate(found_sizes)]
    plan = latents.Plan(
        name=source.name,
        source=source.fingerprint,
        classes=source.classes,
        records=len(source),
        shard=shard,
        size=size,
        flips=1 + flip,
        moments=shape,
        posterior=shape[-1] == 2 * found.coder.shape((*size, 3))[-1],
        dtype=dtype,
        fields=(*fields, *captions, *found.of_texts),
        codec=found.about,
        text=found.text,
        buckets=tuple((*at, len(some)) for at, some in of_sizes) if in_buckets else (),
    )
    _compare(plan, out, split)
    rows = sharding.round_up(max(rows, plan.flips), mesh)
    compiled = jax.jit(found.coder.moments)
    options = parts.data(config)
    read = source.only(("image", *plan.fields))
    return Job(
        plan=plan,
        source=read,
        parts=tuple((of_data.part(read, some), at) for at, some in of_sizes),
        encode=lambda x: compiled(found.arrays, sharding.spread(mesh, x)),
        encode_texts=found.texts and found.texts(rows),
        rows=rows,
        workers=options.get("workers", 0),
        max_bad_rate=options.get("max_bad_rate", records.MAX_BAD_RATE),
    )


def _trained(config: ConfigDict, mesh: Mesh, source: Any, out: str | Path) -> _Encoder:
    """The autoencoder of a run of stage 1; a cache that was begun goes on with the step that it has."""
    begun = [latents.read_plan(out, split) for split in parts.SPLITS]
    at = next((plan.codec["step"] for plan in begun if plan), None)
    coder, arrays, origin = diffusion.codec_of(config, mesh, at)
    if not origin:
        raise ValueError(
            "codec.name = 'identity' encodes nothing; a cache is of an autoencoder's latents"
        )
    told = plain(config.get("tokenizer", {"vocab": 1, "length": 1}))
    length = told["length"]
    # No tokenizer is learnt to know what is read beside its tokens.
    provided = {"vocab": told["vocab"], "length": length, "null": (0,) * length}
    if source.classes:
        provided["classes"] = len(source.classes)
    conditioner = diffusion.conditioner(config, provided)
    fields = () if conditioner is None else conditioner.fields
    about = {"from": origin["run"], "step": origin["step"], "sha256": cached.digest(arrays)}
    return _Encoder(coder, arrays, about, tuple(f for f in fields if f != "tokens"))


def _pretrained(config: ConfigDict, mesh: Mesh) -> _Encoder:
    of = pretrained.opened(config)
    stored = start.tensors(of, [start.CODEC])
    whole = jax.tree.map(lambda _: sharding.replicated(mesh), of.components[start.CODEC].shapes)
    arrays = start.codec(of, stored, whole)
    about = {"from": config.init.path, "step": None, "sha256": start.fingerprint(of, stored)}
    fields = tuple(f for f in of.model.fields if f not in of.texts)
    found = _Encoder(of.model.codec, arrays, about, fields)
    names = pretrained.text_encoders(config, of)
    if not names:
        return found
    held = start.tensors(of, names)
    layouts = jax.tree.map(lambda _: sharding.replicated(mesh), start.shapes(of)["conditioner"])
    params = start.conditioner(of, held, layouts)
    states = [name for field in of.texts for name in conditioners.state_names(field)]
    text = start.fingerprint(of, held)
    texts = functools.partial(_texts, of, params, mesh)
    return found._replace(texts=texts, of_texts=tuple(states), text=text)


def _texts(of: start.Start, params: Params, mesh: Mesh, rows: int) -> Callable[..., Any]:
    """A function from captions to what the text encoders make of them, `rows` at once."""
    read = {"sizes": np.zeros((rows, 6), np.float32)} if "sizes" in of.model.fields else {}

    @jax.jit
    def encode(params, batch):
        return of.model.conditioner.apply({"params": params}, batch, method="encoded")

    def of_captions(captions):
        found = []
        for first in range(0, len(captions), rows):
            some = captions[first : first + rows]
            filled = some + [""] * (rows - len(some))
            batch = {field: make(filled) for field, make in of.texts.items()} | read
            made = encode(params, sharding.spread(mesh, batch))
            found.append({k: np.asarray(v[: len(some)], np.float32) for k, v in made.items()})
        return {k: np.concatenate([one[k] for one in found]) for k in found[0]}

    return of_captions


def _compare(plan: latents.Plan, out: str | Path, split: str) -> None:
    """Raises ValueError if the folder holds another cache."""
    before = latents.read_plan(out, split)
    if before is None or before == plan:
        return
    there, here = asdict(before), asdict(plan)
    name = next(k for k in here if there[k] != here[k])
    raise ValueError(
        f"{out} holds another cache of the {split} split ({name}: {there[name]!r} there, {here[name]!r} here); "
        "give another --out, or remove it"
    )
