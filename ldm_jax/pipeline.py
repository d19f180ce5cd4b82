"""A trained model with the user's verbs: conditions, seeds and what a task is given in, data out.

`tasks` has what is compiled.
"""

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from ldm_jax import heatmaps
from ldm_jax.codec import Codec
from ldm_jax.latent_diffusion import PICTURES, LatentDiffusion
from ldm_jax.nn import taps
from ldm_jax.tasks import TEXT, Drawn, Sampling, make_sampler, make_stepwise, walked
from ldm_jax.training import processes, sharding
from ldm_jax.types import Params

REMEDIES = {
    "neighbours": "give pictures whose neighbours are looked up: --examples, and --features or --clip",
    "segmentation": "use the task semantic, with a map",
    "layout": "give boxes: --boxes FILE.json",
}


@dataclass(frozen=True)
class Pipeline:
    """A model, its arrays, and what turns words into conditions."""

    model: LatentDiffusion
    params: Params
    arrays: Params  # of the codec
    shape: tuple[int, ...]  # of a latent
    mesh: Mesh
    step: int  # of the checkpoint
    config_hash: str
    # Fields of numbers that are made of prompts, and rows of other fields that all samples share.
    texts: Mapping[str, Callable[[Sequence[str]], Any]] = field(default_factory=dict)
    common: Mapping[str, Any] = field(default_factory=dict)
    shrink: int = (
        1  # how much smaller the pictures are that a model for upscaling reads, as "small"
    )
    classes: tuple[str, ...] | None = None
    # The words of a prompt, each with the positions of its tokens.
    words: Callable[[str], heatmaps.Words] | None = None
    # Of a model that reads boxes or neighbours: a row of tokens, and the vectors of the neighbours of pictures.
    boxes: Callable[[Sequence[Mapping[str, Any]]], np.ndarray] | None = None
    similar: Callable[[Sequence[Any], Any, int], np.ndarray] | None = None

    def prompts(self, prompts: Sequence[str], beside: Sequence[str] = ()) -> dict[str, np.ndarray]:
        """Prompts as a batch of conditions; the fields `beside` are added by the caller.

        Raises:
          ValueError: the model is not conditioned on text.
        """
        self._only(self.texts, "prompts", beside=(*self.common, *beside))
        made = {name: rows(list(prompts)) for name, rows in self.texts.items()}
        return made | {k: np.tile(row, (len(prompts), 1)) for k, row in self.common.items()}

    def labels(self, labels: Sequence[str], beside: Sequence[str] = ()) -> dict[str, np.ndarray]:
        """Class names or numbers as a batch of conditions; `beside` as in `prompts`.

        Raises:
          ValueError: the model is not conditioned on labels, or there is no such class.
        """
        self._only(("label",), "labels", beside)
        names = self.classes or ()
        numbers = []
        for label in labels:
            if label in names:
                numbers.append(names.index(label))
            elif label.isdigit() and (not names or int(label) < len(names)):
                numbers.append(int(label))
            else:
                raise ValueError(
                    f"there is no class {label!r}; the classes are {list(names)} or their numbers"
                )
        return {"label": np.asarray(numbers, np.int32)}

    def unconditional(self, n: int, beside: Sequence[str] = ()) -> dict[str, np.ndarray]:
        """A batch of no conditions but those `beside`.

        Raises:
          ValueError: the model wants conditions.
        """
        self._pictured(beside)
        if missing := {*self.model.fields} - {*beside}:
            remedy = next((REMEDIES[f] for f in REMEDIES if f in missing), "give prompts or labels")
            raise ValueError(f"this model is conditioned on {list(self.model.fields)}; {remedy}")
        return {"_": np.zeros(n, np.int32)}

    def reconstruct(
        self, x: Float[np.ndarray, "n *space c"], size: int = 64
    ) -> Float[np.ndarray, "n *space c"]:
        """What the codec keeps of the data, see `reconstructed`; `size` at once, or all."""
        given = (self.model.codec, self.arrays, self.mesh)
        return reconstructed(*given, x, min(size, len(x)))

    def provenance(self, sampling: Sampling) -> dict[str, str]:
        """Where a sample comes from: the model's arrays and config by their hashes, and the sampler's settings."""
        digest = hashlib.sha256()
        for leaf in jax.tree.leaves((self.params, self.arrays)):
            digest.update(np.asarray(leaf).tobytes())
        return {
            "software": "ldm_jax",
            "model_sha256": digest.hexdigest(),
            "config_sha256": self.config_hash,
            "step": str(self.step),
            **dict(sampling.about),
        }

    def check_heatmaps(self) -> None:
        """Looks whether there are heat maps of this model; compiles nothing.

        Raises:
          ValueError: it reads no prompts, or it has no cross-attention.
        """
        if not self.texts:
            raise ValueError(
                "heat maps show where words act, and this model reads no prompts; leave them out"
            )
        heatmaps.check(self.model, self.params, self.shape, self.prompts(["a"]))

    def _pictured(self, beside: Iterable[str]) -> None:
        if missing := [field for field in PICTURES if field in {*self.model.fields} - {*beside}]:
            task = "upscale" if missing[0] == "small" else "inpaint"
            raise ValueError(
                f"this model was trained for the task {task} and draws nothing without pictures; use that task"
            )

    def _only(self, given: Iterable[str], what: str, beside: Iterable[str] = ()) -> None:
        fields = self.model.fields
        self._pictured(beside)
        if not {*given} & {*fields}:
            reads = f"conditioned on {list(fields)}" if fields else "unconditional"
            raise ValueError(f"this model is {reads}; it takes no {what}")
        if {*fields} - {*given, *beside}:
            raise ValueError(
                f"this model wants {list(fields)} together; call Pipeline.drawer with a batch of them"
            )

    @functools.cached_property
    def size(self) -> tuple[int, ...]:
        """The spatial shape of the data that the model was trained on."""
        z = jax.ShapeDtypeStruct((1, *self.shape), jnp.float32)
        return jax.eval_shape(self.model.codec.decode, self.arrays, z).shape[1:-1]

    def drawer(
        self,
        sampling: Sampling,
        size: int = 64,
        tick: Callable[[int, int], Any] | None = None,
    ) -> Callable[..., Iterator[Drawn]]:
        """`(conditions, seeds, negative=None, task=TEXT) -> samples`, one seed a sample, in chunks of at most `size`.

        `negative` are the conditions that guidance leads away from, one a sample; None: the model's null condition.
        `task` is what else is asked for, see `tasks.Task`, made by `build.task`. A chunk is one compiled scan, or, with
        `tick(done, steps)`, which is told of every
        step of all chunks, as many calls of one compiled step.

        Raises:
          ValueError: heat maps of a model without cross-attention, or a judge of pictures of another size. Of what it
            returns, guidance by blocks without self-attention, a negative prompt where nothing leads away from one, or
            gradients that lead nowhere.
        """
        if sampling.heatmaps:
            self.check_heatmaps()
        scale, numbers = jnp.float32(sampling.guidance), sampling.traced()
        params = self.params if sampling.weak is None else self.params | {"weak": sampling.weak}
        if sampling.towards is not None:
            if sampling.towards.size not in (None, self.size):
                raise ValueError(
                    f"the judge reads pictures of {sampling.towards.size}, and this model draws {self.size}; "
                    "give another"
                )
            placed = jax.device_put(sampling.towards.params, sharding.replicated(self.mesh))
            params = params | {"towards": placed}

        def program(task):
            made = (self.model, self.shape, sampling, task)
            if tick is None:
                return lambda number, many, given: make_sampler(*made)(*given)

            def step_by_step(number, many, given):
                def told(done, steps):
                    tick(number * steps + done, many * steps)

                return walked(make_stepwise(*made), given, told)

            return step_by_step

        def chunks(batch, seeds, negative, task):
            draw, n = program(task), len(seeds)
            chunk = sharding.round_up(min(size, n), self.mesh)
            many = -(-n // chunk)

            def place(fields, rows):
                return sharding.spread(
                    self.mesh, jax.tree.map(lambda field: np.asarray(field)[rows], fields)
                )

            for number, start in enumerate(range(0, n, chunk)):
                rows = np.arange(start, start + chunk) % n  # the last chunk is filled up and cut
                # On the mesh like all else, so that a program that reads nothing but them runs there too.
                placed = place({"seed": np.asarray(seeds, np.int32)}, rows)["seed"]
                keys = jax.vmap(jax.random.key)(placed)
                given = (params, self.arrays, place(batch, rows), keys, sampling.points)
                of_task = (place(task.rows, rows), dict(task.numbers))
                against = None if negative is None else place(negative, rows)
                drawn = draw(number, many, (*given, scale, numbers, against, *of_task))
                kept = min(chunk, n - start)
                found = {k: processes.fetch(v) for k, v in drawn._asdict().items() if v is not None}
                yield Drawn(
                    **{k: v[:, :kept] if k == "film" else v[:kept] for k, v in found.items()}
                )

        def draw(batch, seeds, negative=None, task=TEXT):
            taps.check_blocks(self.params["network"], sampling.how.blocks)
            if negative is not None and sampling.how.name == "auto":
                raise ValueError(
                    "autoguidance leads away from a weaker model and not from a negative prompt; give one of them"
                )
            if negative is not None and sampling.guidance == 1.0 and task.combine != "AND":
                raise ValueError(
                    "guidance leads away from a negative prompt, and a guidance of 1 is none; give another, such as 5"
                )
            if sampling.towards is not None and "towards" not in task.rows:
                raise ValueError(
                    "gradients lead towards texts, and none were given; ask for the task by build.ask"
                )
            return chunks(batch, seeds, negative, task)

        return draw


@dataclass(frozen=True)
class FirstStage:
    """A trained autoencoder by itself."""

    codec: Codec
    arrays: Params
    mesh: Mesh
    step: int  # of the checkpoint

    def reconstruct(
        self, x: Float[np.ndarray, "n *space c"], size: int = 64
    ) -> Float[np.ndarray, "n *space c"]:
        """What it keeps of the data, see `reconstructed`; `size` at once, or all."""
        return reconstructed(self.codec, self.arrays, self.mesh, x, min(size, len(x)))


def reconstructed(
    codec: Codec, arrays: Params, mesh: Mesh, x: Float[np.ndarray, "n *space c"], size: int
) -> Float[np.ndarray, "n *space c"]:
    """Data, encoded (a posterior is sampled as in training) and decoded, `size` at once.

    One program for all data of a shape. Of several processes each has all data, and gets all of them back.
    """
    chunk = sharding.round_up(size, mesh)
    there_and_back, found = _there_and_back(codec), []
    for start in range(0, len(x), chunk):
        rows = np.arange(start, start + chunk) % len(x)  # the last chunk is filled up and cut
        placed = sharding.spread(mesh, {"x": x[rows]})["x"]
        made = there_and_back(arrays, placed, jax.random.key(start))
        found.append(processes.fetch(made)[: len(x) - start])
    return np.concatenate(found)


@functools.lru_cache(maxsize=8)
def _there_and_back(codec: Codec) -> Callable[..., jax.Array]:
    return jax.jit(lambda arrays, x, key: codec.decode(arrays, codec.encode(arrays, x, key)))
