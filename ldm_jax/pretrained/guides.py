"""How a pretrained model is guided and walks down the noise levels: methods of `Pretrained`, which is `pipe` here.

They give a changed pipeline, whose verbs draw that way, and leave this one as it is. What is found out about given
images, inversions and the masks of `diffedit`, is found with classifier-free guidance alone.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax import guided
from ldm_jax.diffusion import process, solvers, spacings
from ldm_jax.nn import taps
from ldm_jax.pretrained import inputs
from ldm_jax.towards import Towards
from ldm_jax.training import sharding
from ldm_jax.types import Params
from ldm_jax.weights import scheduler


@dataclasses.dataclass(frozen=True)
class Guide:
    """The kind of guidance with its numbers; its scale is the verbs' `guidance`."""

    how: guided.How = guided.CFG
    numbers: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    params: Mapping[str, Params] = dataclasses.field(default_factory=dict)  # "weak", "towards"
    wanted: Any = None  # what gradients lead to: a row for each picture, or one


PLAIN = Guide()


def guiding(
    pipe: Any,
    name: str = "cfg",
    *,
    weak: Any = None,
    towards: Towards | None = None,
    to: Sequence[str] | str = (),
    pull: float = 1.0,
    through: bool = True,
    blocks: Sequence[str] | None = None,
    two_passes: bool = False,
    **numbers: Any,
) -> Any:
    """The same, guided in another way.

    Args:
      name: "cfg", "apg", "zero_star", "pag", "sag" or "auto", see `guided`, where their options are.
      weak: for "auto" the weaker model that guidance leads away from: another pipeline on the same latents and prompts.
      towards: a network that judges pictures (`towards.clip`), whose gradient, times `pull`, leads to the texts `to`,
        one for each picture or one for all; `through` the network or by the estimate alone, see `gradients`.
      blocks: of pag and sag: regexes for the beginnings of paths, such as "mid" or "up_0".
      two_passes: the two halves of the batch in turn, in less memory.

    Raises:
      ValueError: an unknown kind or option, a number out of range, blocks without self-attention, a weaker model that
        does not fit, or one of `towards` and `to` without the other.
    """
    if name not in guided.KINDS:
        raise ValueError(f"there is no guidance {name!r}; the choices are {list(guided.KINDS)}")
    own = {k: v for k, v in guided.KINDS[name].items() if k != "blocks"}
    takes = {*own, *guided.COMMON} - {"scale", "two_passes"}
    if wrong := sorted({*numbers} - takes):
        raise ValueError(
            f"the guidance {name!r} has no option {wrong[0]!r}; its options are {sorted(takes)}"
        )
    usual = guided.KINDS[name].get("blocks")
    if usual is None and blocks is not None:
        raise ValueError(f"the guidance {name!r} has no blocks; they are of pag and sag")
    chosen = tuple(usual or () if blocks is None else blocks)
    taps.check_blocks(pipe.params["network"], chosen)
    if (name == "auto") != (weak is not None):
        raise ValueError("auto leads away from a weaker model; give one as `weak`, or neither")
    how = guided.How(name, chosen, two_passes, weak and weak.model)
    numbers = own | numbers
    guided.check(how, numbers, steps=pipe.model.path.steps)
    params, wanted = {}, None
    if weak is not None:
        _check_weaker(pipe, weak)
        params["weak"] = weak.params
    if (towards is None) != (not to):
        raise ValueError(
            "give `towards`, what judges pictures, and `to`, the texts that it is to see"
        )
    if towards is not None:
        how = dataclasses.replace(how, towards=towards.log_p, through=through)
        params["towards"] = jax.device_put(towards.params, sharding.replicated(pipe.mesh))
        wanted = jnp.asarray(towards.wanted(inputs.several(to)))
        numbers = numbers | {"pull": pull}
    return dataclasses.replace(pipe, guide=Guide(how, numbers, params, wanted))


def on_grid(pipe: Any, spacing: str, **options: Any) -> Any:
    """The same, whose verbs walk along other noise levels than its scheduler's, such as "karras"; see `grids.grid`.

    Raises:
      ValueError: an unknown spacing; options and numbers of steps are looked at when a verb is called.
    """
    if spacing not in spacings.SPACINGS:
        choices = list(spacings.SPACINGS)
        raise ValueError(f"there is no spacing {spacing!r}; the choices are {choices}")
    return dataclasses.replace(pipe, spacing=(spacing, options))


def solving(pipe: Any, solver: str, **options: Any) -> Any:
    """The same, whose solver of this name has these options, such as `order=3` of dpm_solver.

    Raises:
      ValueError: an unknown solver or option.
    """
    solvers.make(solver, pipe.model.path, **options)
    return dataclasses.replace(pipe, options={**pipe.options, solver: options})


def wanted(pipe: Any, n: int) -> Any:
    """What gradients lead to, a row for each of n pictures.

    Raises:
      ValueError: as many texts as neither one nor the pictures.
    """
    rows = pipe.guide.wanted
    if rows is None or len(rows) == n:
        return rows
    if len(rows) != 1:
        raise ValueError(
            f"gradients lead to {len(rows)} texts and {n} pictures are drawn; give one"
        )
    return jnp.repeat(rows, n, axis=0)


def check(pipe: Any, at: process.Point, several: bool) -> None:
    """Raises: ValueError: guidance that does not go with these steps or, if there are, with `several` prompts."""
    guided.check(pipe.guide.how, pipe.guide.numbers, len(at.t) - 1)
    if several:
        guided.check_several(pipe.guide.how, pipe.guide.numbers)


def only_scales(pipe: Any, verb: str) -> None:
    """Raises: ValueError: other guidance than the verb's own scales was asked for."""
    if pipe.guide.how.name != "cfg" or pipe.guide.numbers:
        raise ValueError(f"{verb} has two scales of guidance, and takes no other kind and number")


def _check_weaker(pipe: Any, weak: Any) -> None:
    noises = [scheduler.read(of.schedulers["scheduler"])[:5] for of in (pipe, weak)]
    files = [{name: of.files for name, of in one.tokenizers.items()} for one in (pipe, weak)]
    fits = {
        "noise": noises[0] == noises[1],
        "latents": pipe.latent_channels == weak.latent_channels,
        "scale of latents": pipe.components["vae"].scale == weak.components["vae"].scale,
        "conditions": pipe.model.fields == weak.model.fields,
        "tokenizers": files[0] == files[1],
        "devices": pipe.mesh == weak.mesh,
    }
    for what, same in fits.items():
        if not same:
            raise ValueError(
                f"the weaker model does not fit: the two differ in their {what}; give one that differs in its network "
                "alone, or in how long it was trained"
            )
