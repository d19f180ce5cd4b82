"""What is asked for, and what comes of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from jaxtyping import Float

from ldm_jax import guided
from ldm_jax.diffusion import samplers
from ldm_jax.towards import Towards
from ldm_jax.types import Params

NAMES = (
    "text",
    "image_to_image",
    "inpaint",
    "outpaint",
    "edit",
    "prompt_to_prompt",
    "interpolate",
    "panorama",
    "upscale",
    "invert",
    "edit_friendly",
    "high_resolution",
    "seamless",
    "semantic",
)


class Drawn(NamedTuple):
    """Samples in [-1, 1], and on request or by their task what was seen on the way to them."""

    x: Float[Any, "n *space c"]
    film: Float[Any, "frames n *space c"] | None = None  # estimates of x0, oldest first
    maps: Float[Any, "n *latent tokens"] | None = None  # see `heatmaps`
    source: Float[Any, "n *space c"] | None = None  # what the source prompts drew
    mask: Float[Any, "n *space 1"] | None = None  # 1 where something new was made


@dataclass(frozen=True)
class Sampling:
    """How to sample; the solver is data of functions, the rest numbers."""

    solver: samplers.Solver
    points: samplers.Point  # the grid of noise levels
    guidance: float = 1.0  # the scale of guidance; 1: none
    film: bool = False
    heatmaps: bool = False
    how: guided.How = guided.CFG  # the kind of guidance ...
    numbers: Mapping[str, Any] = field(default_factory=dict)  # ... and its other options
    weak: Params | None = None  # of the weaker model that autoguidance leads away from
    towards: Towards | None = None  # what gradients lead to, see `led`
    stochastic: bool = False  # whether the solver adds noise ...
    invertible: bool = False  # ... as the last thing in its steps, see `inversion.edit_friendly`
    about: tuple[tuple[str, str], ...] = ()  # for the record: solver, steps, ...

    def traced(self) -> dict[str, Any]:
        """The numbers as arrays."""
        return guided.traced(self.numbers)

    def led(self, towards: Towards, pull: float = 1.0, through: bool = True) -> "Sampling":
        """The same, with the gradient of what `towards` finds likely, times `pull` (see `gradients.by_estimate`)."""
        how = replace(self.how, towards=towards.log_p, through=through)
        numbers = {**self.numbers, "pull": pull}
        about = (*self.about, ("pull", str(pull)))
        return replace(self, how=how, numbers=numbers, towards=towards, about=about)


@dataclass(frozen=True)
class Task:
    """A task and its inputs beside conditions and seeds.

    `rows` have one row a sample: "x", the given data [n *space c]; "mask" [n *space 1], 1 where something new is made;
    "source", the batch of the prompts of what is given or edited; "second", of those at the end of an interpolation,
    with "seed" and "share"; "align", "share" and "weigh" of `prompt_to_prompt.Exchange`; "others", the batches of the
    prompts that are combined with the first, and "weights" [n prompts] of all of them; "towards", what gradients
    lead to. `numbers` are shared: "taken", the steps that a strength takes; "limit", see `diffedit.binarised`; "cross"
    and "own", the steps for which attention is the source's.
    """

    name: str = "text"
    rows: Mapping[str, Any] = field(default_factory=dict)
    numbers: Mapping[str, Any] = field(default_factory=dict)
    space: tuple[int, ...] | None = None  # of the latents, where it is not the model's
    repaint: tuple[int, int] | None = None  # jump and times, see `inpainting.repaint`
    combine: str | None = None  # "AND" or "BLEND": how several prompts make one picture


TEXT = Task()
