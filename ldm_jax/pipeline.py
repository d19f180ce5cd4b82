"""A trained model with the user's verbs: conditions and seeds in, data out, one compiled program a shape.

Prompts, seeds, guidance scale and the grid's values are traced; only the solver, the number of steps and the shapes
compile anew. Every sample has its own seed, so that it does not depend on which others are drawn with it.
"""

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from ldm_jax import guided, heatmaps
from ldm_jax.diffusion import samplers
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.training import sharding
from ldm_jax.types import Params

FILM = 8  # frames of a film
PLAIN = guided.How()


class Drawn(NamedTuple):
    """Samples in [-1, 1], and on request what was seen on the way to them."""

    x: Float[np.ndarray, "n *space c"]
    film: Float[np.ndarray, "frames n *space c"] | None = None  # estimates of x0, oldest first
    maps: Float[np.ndarray, "n *latent tokens"] | None = None  # see `heatmaps`


@dataclass(frozen=True)
class Sampling:
    """How to sample; the solver is data of functions, the rest numbers."""

    solver: samplers.Solver
    points: samplers.Point  # the grid of noise levels
    guidance: float = 1.0  # the scale of classifier-free guidance; 1: none
    film: bool = False
    heatmaps: bool = False
    how: guided.How = PLAIN  # the kind of guidance ...
    numbers: Mapping[str, Any] = field(default_factory=dict)  # ... and its other options
    about: tuple[tuple[str, str], ...] = ()  # for the record: solver, steps, ...

    def traced(self) -> dict[str, Any]:
        """The numbers as arrays."""
        whole = ("zero_steps",)
        return {
            k: jax.tree.map(jnp.int32 if k in whole else jnp.float32, v)
            for k, v in self.numbers.items()
        }


def make_sampler(
    model: LatentDiffusion, shape: tuple[int, ...], sampling: Sampling
) -> Callable[..., Any]:
    """`(params, arrays, batch, keys, points, scale, numbers, negative) -> Drawn`, jitted; `shape` is that of a latent.

    The same function for every guidance scale but 1, and every grid of as many steps. `negative` is a batch whose
    conditions take the place of the null condition, or None.
    """
    leads = sampling.guidance != 1.0 and model.conditioner is not None
    steps = sampling.points.t.shape[0] - 1
    shown = (sampling.film, sampling.heatmaps)
    return _sampler(model, shape, sampling.solver, steps, leads, sampling.how, *shown)


@functools.lru_cache(maxsize=8)
def _sampler(
    model: LatentDiffusion,
    shape: tuple[int, ...],
    solver: samplers.Solver,
    steps: int,
    leads: bool,
    how: guided.How,
    film: bool,
    maps: bool,
) -> Callable[..., Any]:
    frames = np.unique(np.linspace(0, steps - 1, FILM).round().astype(int))
    keep = (*["x0"] * film, *["x"] * maps)

    @jax.jit
    def draw(params, arrays, batch, keys, points, scale, numbers=None, negative=None):
        cond, null = model.condition(params, batch), None
        if leads:
            null = (
                model.null(params, batch) if negative is None else model.condition(params, negative)
            )
        denoise = guided.denoiser(model, how, params, null, scale, numbers or {}, points)
        noise, walk = jax.vmap(jax.random.split, out_axes=1)(keys)
        x_T = samplers.initial_noise(points, noise, (len(noise), *shape))
        z, way = samplers.sample(denoise, solver, points, x_T, walk, cond, keep=keep)
        seen = {}
        if film:
            seen["film"] = jax.lax.map(lambda z: model.codec.decode(arrays, z), way[0][frames])
        if maps:
            seen["maps"] = heatmaps.of_steps(model, params, cond, points, way[-1])
        return Drawn(model.codec.decode(arrays, z), **seen)

    return draw


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
    classes: tuple[str, ...] | None = None
    # The words of a prompt, each with the positions of its tokens.
    words: Callable[[str], heatmaps.Words] | None = None

    def prompts(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """Prompts as a batch of conditions.

        Raises:
          ValueError: the model is not conditioned on text.
        """
        self._only(self.texts, "prompts", beside=self.common)
        made = {name: rows(list(prompts)) for name, rows in self.texts.items()}
        return made | {k: np.tile(row, (len(prompts), 1)) for k, row in self.common.items()}

    def labels(self, labels: Sequence[str]) -> dict[str, np.ndarray]:
        """Class names or numbers as a batch of conditions.

        Raises:
          ValueError: the model is not conditioned on labels, or there is no such class.
        """
        self._only(("label",), "labels")
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

    def unconditional(self, n: int) -> dict[str, np.ndarray]:
        """A batch of no conditions.

        Raises:
          ValueError: the model wants conditions.
        """
        if self.model.fields:
            raise ValueError(
                f"this model is conditioned on {list(self.model.fields)}; give prompts or labels"
            )
        return {"_": np.zeros(n, np.int32)}

    def reconstruct(
        self, x: Float[np.ndarray, "n *space c"], size: int = 64
    ) -> Float[np.ndarray, "n *space c"]:
        """What the codec keeps of the data: encoded (a posterior is sampled as in training) and decoded."""

        @jax.jit
        def there_and_back(arrays, x, key):
            return self.model.codec.decode(arrays, self.model.codec.encode(arrays, x, key))

        starts = range(0, len(x), size)
        parts = [there_and_back(self.arrays, x[i : i + size], jax.random.key(i)) for i in starts]
        return np.concatenate([np.asarray(part) for part in parts])

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
          ValueError: it reads no prompts, its tokenizer does not tell words, or it has no cross-attention.
        """
        if not self.texts:
            raise ValueError(
                "heat maps show where words act, and this model reads no prompts; leave them out"
            )
        if self.words is None:
            raise ValueError(
                "heat maps need to know which tokens make a word, which the tokenizers of pretrained models "
                "do not tell here; only models with a tokenizer of their own have them"
            )
        heatmaps.check(self.model, self.params, self.shape, self.prompts(["a"]))

    def _only(self, given: Iterable[str], what: str, beside: Iterable[str] = ()) -> None:
        fields = self.model.fields
        if not {*given} & {*fields}:
            reads = f"conditioned on {list(fields)}" if fields else "unconditional"
            raise ValueError(f"this model is {reads}; it takes no {what}")
        if {*fields} - {*given, *beside}:
            raise ValueError(
                f"this model wants {list(fields)} together; call Pipeline.drawer with a batch of them"
            )

    def drawer(self, sampling: Sampling, size: int = 64) -> Callable[..., Iterator[Drawn]]:
        """`(conditions, seeds, negative=None) -> samples`, one seed a sample, in chunks of at most `size`.

        `negative` are the conditions that guidance leads away from, one a sample; None: the model's null condition.

        Raises:
          ValueError: heat maps of a model without cross-attention.
        """
        if sampling.heatmaps:
            self.check_heatmaps()
        sampler = make_sampler(self.model, self.shape, sampling)
        numbers = sampling.traced()

        def draw(batch, seeds, negative=None):
            if negative is not None and sampling.guidance == 1.0:
                raise ValueError(
                    "guidance leads away from a negative prompt, and a guidance of 1 is none; set another, such as 5"
                )
            n = len(seeds)
            chunk = sharding.round_up(min(size, n), self.mesh)
            for start in range(0, n, chunk):
                rows = np.arange(start, start + chunk) % n  # the last chunk is filled up and cut
                placed, against = (
                    None
                    if fields is None
                    else sharding.place(
                        self.mesh, {k: np.asarray(v)[rows] for k, v in fields.items()}
                    )
                    for fields in (batch, negative)
                )
                keys = jax.vmap(jax.random.key)(jnp.asarray(np.asarray(seeds)[rows]))
                scale = jnp.float32(sampling.guidance)
                given = (self.params, self.arrays, placed, keys, sampling.points, scale)
                x, film, maps = sampler(*given, numbers, against)
                kept = min(chunk, n - start)
                yield Drawn(
                    np.asarray(x)[:kept],
                    None if film is None else np.asarray(film)[:, :kept],
                    None if maps is None else np.asarray(maps)[:kept],
                )

        return draw
