"""Fine-tuning: the run of a diffusion model that starts from pretrained weights, and the pipeline that samples from it.

    init = dict(weights="diffusers", path="path/to/stable-diffusion-v1-5", dtype="bfloat16")

says what `model`, `conditioner`, `codec` and `tokenizer` say elsewhere, and `path` and `target` too unless the config
has them: to train towards v what was trained towards eps, say. The network is trained, the autoencoder never is, and
the text encoders are if `train_text_encoder` says so. What is not trained is read from there at every start and is
in no checkpoint; `init.json` keeps its hash, so that it stays the same. A single file in the original layout is

    init = dict(weights="original", path="v1-5-pruned.safetensors", tokenizers=("path/to/clip-tokenizer",))

with `config`, a folder of diffusers or the original YAML file, where shapes do not tell all.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ldm_jax import conditioners
from ldm_jax.build import autoencoder, buckets, cached, diffusion, judged, parts, updates, workdir
from ldm_jax.build.sections import checked, did_you_mean
from ldm_jax.data import latents
from ldm_jax.diffusion import process
from ldm_jax.pipeline import Pipeline
from ldm_jax.pretrained import start
from ldm_jax.training import checkpoints, diffusion_loss, loop, sharding
from ldm_jax.types import Params

SECTION = dict(
    weights=str,
    path=str,
    variant=str,
    config=str,
    tokenizers=tuple[str, ...],
    dtype=str,
    remat=bool | str,
    train_text_encoder=bool,
)
DEFAULTS = dict(
    variant="", config="", tokenizers=(), dtype="float32", remat=False, train_text_encoder=False
)


class Kind(NamedTuple):
    """A layout of weights."""

    start: Callable[..., start.Start]  # (path, **own, dtype, remat)
    own: tuple[str, ...]  # entries that other layouts have not
    is_folder: bool


KINDS = {
    "diffusers": Kind(start.from_folder, ("variant",), True),
    "original": Kind(start.from_file, ("config", "tokenizers"), False),
}
SPREAD = ((".*", "fsdp"),)  # text encoders that are not trained; the autoencoder is small


def options(config: ConfigDict) -> dict[str, Any]:
    """The section `init` with its defaults.

    Raises:
      ValueError, FileNotFoundError: a wrong entry, or weights that are not there.
    """
    given = DEFAULTS | checked("init", config.init, SECTION, needed=("weights", "path"))
    if given["weights"] not in KINDS:
        raise ValueError(
            f"init.weights = {given['weights']!r} is unknown{did_you_mean(given['weights'], KINDS)}"
        )
    kind, path = KINDS[given["weights"]], Path(given["path"])
    what = "folder" if kind.is_folder else "file"
    if idle := [k for other in KINDS.values() for k in other.own if k not in kind.own and given[k]]:
        raise ValueError(
            f"init.{idle[0]} is of no use with init.weights = {given['weights']!r}; leave it out"
        )
    if not path.exists():
        raise FileNotFoundError(
            f"there is no {what} {given['path']!r} with pretrained weights; say where it lies: --config.init.path=..."
        )
    if path.is_dir() != kind.is_folder:
        raise ValueError(
            f"init.path = {given['path']!r} is no {what}; "
            "with init.weights = 'diffusers' give a folder, with 'original' a single file"
        )
    return given


def opened(config: ConfigDict) -> start.Start:
    """The model that the config starts from, on the config's path and towards its target if it has them.

    Raises:
      ValueError, FileNotFoundError: one sentence about the weights, or about a path and a target that do not fit.
    """
    given = options(config)
    kind = KINDS[given["weights"]]
    of = kind.start(**{name: given[name] for name in ("path", *kind.own, "dtype", "remat")})
    for name in sorted(workdir.RETRAINED & set(config)):
        made = parts.make_section(f"diffusion.{name}s", config[name], name)
        of = of._replace(model=of.model._replace(**{name: made}))
    process.check(of.model.path, of.model.target)
    return of


def split(config: ConfigDict, of: start.Start) -> tuple[set[str], set[str]]:
    """The names of the components that are trained, and of those that are not.

    Raises:
      ValueError: a text encoder is to be trained and there is none.
    """
    texts = set(of.encoders.values())
    trained = {start.NETWORK}
    if options(config)["train_text_encoder"]:
        if not texts:
            raise ValueError("init.train_text_encoder is set and the model has no text encoder")
        trained |= texts
    return trained, {start.NETWORK, start.CODEC, *texts} - trained


def text_encoders(config: ConfigDict, of: start.Start) -> list[str]:
    """The text encoders that are not trained: what they make of captions may be cached."""
    trains, _ = split(config, of)
    return [name for name in of.encoders.values() if name not in trains] if of.texts else []


def states(config: ConfigDict, of: start.Start, source: Any, stored: start.Stored) -> list[str]:
    """The fields of a cache that hold what the text encoders make of captions; none if they are trained.

    Raises:
      ValueError: they are those of other encoders.
    """
    names = text_encoders(config, of)
    if not names or not isinstance(source, latents.Cached) or not source.plan.text:
        return []
    if source.plan.text != start.fingerprint(of, {name: stored[name] for name in names}):
        raise ValueError(
            f"the captions of the {source.name} were encoded by other text encoders than those of {config.init.path}; "
            "write another cache, or give the config those encoders"
        )
    return [name for field in of.texts for name in conditioners.state_names(field)]


def trained_shapes(config: ConfigDict, of: start.Start) -> Params:
    """Shapes of the parameters that are trained: {"network": ...}, and "conditioner" if it is."""
    shapes = start.shapes(of)
    with_texts = options(config)["train_text_encoder"]
    return {k: v for k, v in shapes.items() if k == "network" or with_texts}


def check_origin(directory: Path, config: ConfigDict, digest: str) -> None:
    """Looks whether what is not trained is what the run in `directory`, if there is one, was started with.

    Raises:
      ValueError: it is not.
    """
    path = directory / "init.json"
    if path.is_file() and json.loads(path.read_text())["frozen_sha256"] != digest:
        raise ValueError(
            f"the weights in {config.init.path} are not those that the run in {directory} was started with; "
            "put the old ones back, or give another --workdir"
        )


def frozen(config: ConfigDict, of: start.Start, stored: start.Stored, mesh: Mesh) -> Params:
    """What is not trained, on the mesh: {"params": the text encoders' or {}, "arrays": the codec's}."""
    shapes = start.shapes(of)
    everywhere = sharding.replicated(mesh)
    whole = jax.tree.map(lambda _: everywhere, of.components[start.CODEC].shapes)
    arrays = jax.device_put(start.codec(of, stored, whole), everywhere)
    if "conditioner" not in shapes or "conditioner" in trained_shapes(config, of):
        return {"params": {}, "arrays": arrays}
    layouts = sharding.layouts(mesh, SPREAD, shapes["conditioner"])
    return {
        "params": {"conditioner": start.conditioner(of, stored, layouts)},
        "arrays": arrays,
    }


def run(config: ConfigDict, directory: Path) -> loop.Run:
    mesh = parts.mesh(config)
    of = opened(config)
    trains, keeps = split(config, of)
    source = parts.training(config)
    workdir.compare(config, source, directory)
    diffusion.latent_shape(config, of.model.codec)  # raises where the pictures' size does not fit
    stored = start.tensors(of, keeps)
    fields = (*of.model.fields, *states(config, of, source, stored))
    reading = dict(fields=fields, texts=of.texts)
    batches = buckets.batches(config, source, **reading)
    of_codec = {start.CODEC: stored[start.CODEC]}
    trained_on = cached.model(of.model, source, lambda: start.fingerprint(of, of_codec))
    weights = start.tensors(of, trains)
    digest = start.fingerprint(of, stored)
    check_origin(directory, config, digest)
    shapes = trained_shapes(config, of)

    def init(key):
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def load(layouts):
        params = {"network": start.network(of, weights, layouts["network"])}
        if "conditioner" in layouts:
            params["conditioner"] = start.conditioner(of, weights, layouts["conditioner"])
        return params

    shown = parts.shown(config, **reading)

    def open_(params, fixed):
        return _pipeline(config, of, mesh, params | fixed["params"], fixed["arrays"])

    alone = _pipeline(config, of, mesh, None, None)
    made = diffusion.learning(
        config,
        trained_on,
        mesh=mesh,
        fixed=parts.validation_batches(config, **reading),
        shown=parts.bare(shown, 0),
        captions=shown.captions(0) if of.texts else None,
        together=tuple(of.texts),
        whole=diffusion_loss.with_frozen,
        init=init,
        load=load,
        frozen=frozen(config, of, stored, mesh),
        batches=batches.iterate,
        shapes=buckets.shapes(batches),
        told=buckets.told(batches),
        judged=judged.diffusion(config, directory, alone, open_),
    )
    workdir.claim(config, source, directory)
    origin = {k: options(config)[k] for k in ("weights", "path")}
    workdir.remember(directory / "init.json", origin | {"frozen_sha256": digest})
    return made


def pipeline(
    config: ConfigDict, directory: Path, step: int | None = None, ema: str | None = None
) -> Pipeline:
    mesh, average = sharding.make_mesh(), updates.average_of(config, ema)
    if not Path(config.init.path).exists():
        raise FileNotFoundError(
            f"the run in {directory} reads what it did not train from {config.init.path}, and there is no such folder "
            f"or file; put it back, or write its new place into {directory / 'config.json'}"
        )
    of = opened(config)
    stored = start.tensors(of, split(config, of)[1])
    check_origin(directory, config, start.fingerprint(of, stored))
    shapes = trained_shapes(config, of)
    layouts = jax.tree.map(lambda _: sharding.replicated(mesh), shapes)
    params, at = checkpoints.load_ema(directory, shapes, layouts, step, average)
    rest = frozen(config, of, stored, mesh)
    return _pipeline(config, of, mesh, params | rest["params"], rest["arrays"], at)


def _pipeline(
    config: ConfigDict,
    of: start.Start,
    mesh: Mesh,
    params: Params,
    arrays: Params,
    step: int = 0,
) -> Pipeline:
    """The pipeline of a model."""
    *size, _ = autoencoder.data_shape(config)
    return Pipeline(
        model=of.model,
        params=params,
        arrays=arrays,
        shape=diffusion.latent_shape(config, of.model.codec),
        mesh=mesh,
        step=step,
        config_hash=workdir.config_hash(config),
        texts=of.texts,
        words=next((tokenizer.words for tokenizer in of.tokenizers.values()), None),
        # Of a picture that was made in its size and not cut.
        common={"sizes": (*size, 0.0, 0.0, *size)} if "sizes" in of.model.fields else {},
    )
