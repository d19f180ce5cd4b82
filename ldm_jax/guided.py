"""The guidance of a latent diffusion model by name, with its numbers traced: from what users say to a `Denoiser`.

    cfg         classifier-free guidance                 scale
    apg         projected                                scale, eta, radius
    zero_star   CFG-Zero*, for flows                     scale, zero_steps
    pag         beside it, perturbed self-attention      scale, strength, blocks
    sag         beside it, blurred where it attends      scale, strength, blocks
    auto        autoguidance, away from a weaker model   scale

and with each of them `rescale`, `threshold` with its `limit`, `interval`, two_passes, and the `pull` of guidance by
gradients. Which of these are given decides what is compiled, their values do not. A scale of 1 is no classifier-free
guidance, and costs none.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from ldm_jax.diffusion import blurring, finishes, gradients, guidance, process, samplers
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.nn import taps
from ldm_jax.types import Cond, Denoiser, Params, Prediction

# The options of each kind beside the common ones, with what they are where they are not given.
KINDS: dict[str, dict[str, Any]] = {
    "cfg": {},
    "apg": dict(eta=0.0, radius=jnp.inf),
    "zero_star": dict(zero_steps=1),
    "pag": dict(strength=3.0, blocks=("mid",)),
    "sag": dict(strength=0.75, blocks=("mid",)),
    "auto": {},
}
COMMON = ("scale", "rescale", "threshold", "limit", "interval", "two_passes")


@dataclass(frozen=True)
class How:
    """The settings of which another value is another program."""

    name: str = "cfg"
    blocks: tuple[str, ...] = ()  # of pag and sag, see `taps`
    two_passes: bool = False  # instead of a doubled batch: slower, in half the memory
    weak: LatentDiffusion | None = None  # of auto; its parameters are params["weak"]
    towards: Callable[..., Any] | None = None  # a `towards.LogP`; its are params["towards"]
    # Whether the gradient goes through the network, see `gradients.by_estimate`.
    through: bool = True


CFG = How()


class Beside(NamedTuple):
    """The conditions beside the one that a denoiser is called with."""

    null: Cond | None = None  # what guidance leads away from; None: no classifier-free guidance
    weak: Cond | None = None  # what the weaker model of auto reads
    others: tuple[Cond, ...] = ()  # what guidance leads to as well ...
    weights: Float[Array, "b n"] | None = (
        None  # ... and by which parts of the scale, the first's included
    )
    log_p: gradients.LogLikelihood | None = None  # what gradients lead to, of estimated latents


def check(how: How, numbers: Mapping[str, Any], steps: int, where: str = "guidance") -> None:
    """Raises: ValueError: a number that is out of range, or two passes of what has none; `where` is of the message."""
    if how.name in ("sag", "auto") and how.two_passes:
        raise ValueError(f"{where}: {how.name} has no two passes to choose; leave two_passes out")
    ranges = {
        "rescale": (lambda v: 0 <= v <= 1, "from 0 to 1"),
        "threshold": (lambda v: 0 < v <= 1, "above 0 and up to 1"),
        "limit": (lambda v: v > 0 and "threshold" in numbers, "above 0, beside a threshold"),
        "interval": (lambda v: v[0] < v[1], "a lower and a higher time, of 0 (data) to 1 (noise)"),
        "radius": (lambda v: v > 0, "above 0"),
        "zero_steps": (lambda v: 0 <= v < steps, f"from 0 to less than the {steps} steps"),
    }
    for key, (right, words) in ranges.items():
        if key in numbers and not right(numbers[key]):
            raise ValueError(f"{where}.{key} = {numbers[key]} is out of range; give it {words}")


def check_several(how: How, numbers: Mapping[str, Any]) -> None:
    """Raises: ValueError: guidance that does not go with prompts that AND combines."""
    also = sorted({"rescale", "threshold"} & set(numbers))
    if how.name != "cfg" or also:
        other = also[0] if also else f"the guidance {how.name}"
        raise ValueError(f"AND is guidance of its own and takes no {other}; use cfg alone")


def traced(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers as arrays."""
    whole = ("zero_steps",)
    return {
        k: jax.tree.map(jnp.int32 if k in whole else jnp.float32, v) for k, v in numbers.items()
    }


def likelihood(
    model: LatentDiffusion, how: How, params: Params, arrays: Params, wanted: Any
) -> gradients.LogLikelihood | None:
    """`Beside.log_p`: what is said of the pictures that the codec, with its `arrays`, makes of latents."""
    if how.towards is None:
        return None

    def log_p(z, t):
        return how.towards(params["towards"], wanted, model.codec.decode(arrays, z), t)

    return log_p


def denoiser(
    model: LatentDiffusion,
    how: How,
    params: Params,
    beside: Beside,
    scale: ArrayLike,
    numbers: Mapping[str, Any],
    points: samplers.Point,
) -> Denoiser:
    """The model's denoiser, guided.

    `numbers` has the other options that were given, scalars or one a sample, "interval" as a pair of times.
    """
    path, plain, finish, null = model.path, model.denoiser(params), [], beside.null
    if how.name == "apg":
        finish.append(finishes.apg(path, numbers["eta"], numbers["radius"]))
    if how.name == "zero_star":
        finish.append(finishes.zero_star(path))
    if how.name == "pag":
        perturbed = taps.with_identity(model.raw(params), how.blocks)
        weak = process.make_denoiser(perturbed, path, model.target)
        finish.append(finishes.further(weak, numbers["strength"]))
    if "rescale" in numbers:
        finish.append(finishes.rescale(path, numbers["rescale"]))
    if "threshold" in numbers:
        limit = numbers.get("limit", 1.0)
        finish.append(finishes.threshold(path, numbers["threshold"], limit))
    if how.name == "sag":
        look = self_attention(model, params, how.blocks)
        made = blurring.sag(look, path, numbers["strength"], null, scale, *finish)
    elif how.name == "auto":
        made = guidance.autoguidance(plain, _weak(how.weak, params, beside.weak), scale, *finish)
    elif beside.others:
        scales = list(scale * beside.weights.T)
        batched = not how.two_passes
        made = guidance.compose(plain, beside.others, null, scales, batched)
    elif null is None:
        made = guidance.finished(plain, *finish) if finish else plain
    else:
        made = guidance.cfg(plain, null, scale, *finish, batched=not how.two_passes)
    if beside.log_p is not None:
        pull = numbers["pull"]
        made = gradients.by_estimate(made, path, beside.log_p, pull, how.through)
    if "interval" in numbers:
        made = guidance.interval(made, plain, *numbers["interval"])
    if "zero_steps" in numbers:
        first, whole = points.t[numbers["zero_steps"]], made

        def made(x_t, t, cond):  # what stands still has no variance
            return whole(x_t, t, cond).replace(spread=None)

        made = guidance.interval(guidance.still(path), made, first, jnp.inf)
    return made


def _weak(model: LatentDiffusion, params: Params, cond: Cond) -> Denoiser:
    """The weaker model under its own conditions, whatever those of the other are."""
    denoise = model.denoiser(params["weak"])
    return lambda x_t, t, _: denoise(x_t, t, cond)


def looking(
    model: LatentDiffusion, params: Params, of_tokens: bool, blocks: tuple[str, ...] = (".*",)
) -> Callable[..., tuple[Prediction, taps.Maps]]:
    """`(x_t, t, cond) -> (prediction, maps)`, of attention to tokens or between positions; see `taps.with_maps`."""
    tapped = taps.with_maps(model.raw(params), of_tokens, blocks)

    def look(x_t, t, cond):
        found = []

        def network(*args):
            out, maps = tapped(*args)
            found.append(maps)
            return out

        prediction = process.make_denoiser(network, model.path, model.target)(x_t, t, cond)
        return prediction, found[0]

    return look


def self_attention(
    model: LatentDiffusion, params: Params, blocks: tuple[str, ...]
) -> Callable[..., tuple[Prediction, Float[Array, "b *coarse"]]]:
    """`(x_t, t, cond) -> (prediction, how much each position is attended to)`, in the first of these blocks."""
    look = looking(model, params, False, blocks)

    def read(x_t, t, cond):
        prediction, maps = look(x_t, t, cond)
        return prediction, taps.received(next(iter(maps.values())))

    return read
