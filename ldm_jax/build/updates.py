"""How a run's parameters move, by its config: the optimizer, the moving averages, and the norms that are told."""

import re

import optax
from beartype.door import is_bearable
from ml_collections import ConfigDict

from ldm_jax import tree
from ldm_jax.build.sections import checked, did_you_mean, make, make_section, plain, section
from ldm_jax.build.workdir import TOLD
from ldm_jax.models import vq
from ldm_jax.training import averages, codebook, norms
from ldm_jax.training import optimizer as optimizers
from ldm_jax.types import Loss, Params

# Of the section of the optimizer, what is not its own.
OPTIMIZER = dict(ema=float | tuple[float, ...] | dict, accumulate=int, frozen=tuple[str, ...])
CODEBOOK = "gen/codebook"  # the parameter
EMA = dict(decays=tuple[float, ...], power=tuple[float, ...])


def averages_of(config: ConfigDict) -> averages.Averages:
    """The moving averages: `optimizer.ema` is a decay, several, or dict(decays=..., power=...).

    Raises:
      ValueError: no decay, no width of a power-function average, none at all, or one twice.
    """
    given = plain(config.optimizer.get("ema", 0.9999))
    checked("optimizer", {"ema": given}, OPTIMIZER)
    several = given if isinstance(given, dict) else {"decays": given}
    if single := not isinstance(given, dict | tuple):
        several = {"decays": (float(given),)}
    checked("optimizer.ema", several, EMA)
    decays, widths = several.get("decays", ()), several.get("power", ())
    for decay in decays:
        if not 0.0 <= decay < 1.0:
            raise ValueError(
                f"optimizer.ema = {decay} is no decay; give a number from 0 to below 1"
            )
    if single:
        return decays[0]
    found = [averages.fixed(float(decay)) for decay in decays]
    found += [averages.power(float(width)) for width in widths]
    names = [average.name for average in found]
    if not names or len(set(names)) < len(names):
        raise ValueError(
            f"optimizer.ema = {given!r} names {'one average twice' if names else 'no average'}; give a decay such as "
            "0.9999, several, or dict(decays=(0.9999,), power=(0.05, 0.1))"
        )
    return tuple(found)


def average_of(config: ConfigDict, name: str | None = None) -> str | None:
    """Which of a run's averages is read from its checkpoints: the first, unless one is named; None if it has just one.

    Raises:
      ValueError: it keeps none of that name.
    """
    found = averages_of(config)
    if isinstance(found, float):
        if name not in (None, str(found)):
            raise ValueError(
                f"there is no average {name!r}; this run keeps one alone, of the decay {found}"
            )
        return None
    names = [average.name for average in found]
    if name is None:
        return names[0]
    if name not in names:
        raise ValueError(f"there is no average {name!r}{did_you_mean(name, names)}")
    return name


def groups_of(config: ConfigDict, params: Params) -> norms.Rules | bool:
    """The groups of layers whose gradients are measured: `log.norms`.

    Raises:
      ValueError: neither a yes or no nor rules, or rules that do not fit the parameters.
    """
    rules = plain(config.log.get("norms", TOLD["norms"]))
    if not is_bearable(rules, bool | tuple[tuple[str, str], ...]) or rules == ():
        raise ValueError(
            f"log.norms = {rules!r} is neither True nor a list of (regex, group), such as "
            '((".*/mid/.*", "middle"), (".*", "rest"))'
        )
    if not isinstance(rules, bool):
        tree.map_by_rule(rules, params)
    return rules


def optimizer_of(config: ConfigDict) -> tuple[optax.GradientTransformation, averages.Averages, int]:
    """The optimizer, the moving averages, and the micro-batches of a step."""
    options = section(config.optimizer, "optimizer")
    extra = {k: options.pop(k) for k in OPTIMIZER if k in options}
    checked("optimizer", extra, OPTIMIZER)
    ema, accumulate = averages_of(config), extra.get("accumulate", 1)
    tx = make("training", f"optimizer.{options.pop('name')}", steps=config.steps, **options)
    if still := extra.get("frozen", ()):
        tx = optimizers.frozen(tx, still)
    if rule := codebook_rule(config):
        if any(re.fullmatch(pattern, CODEBOOK) for pattern in still):
            raise ValueError(
                f"the section codebook says how {CODEBOOK!r} learns, and optimizer.frozen that it does not; "
                "leave one of them out"
            )
        tx = codebook.learnt(tx, rule)
    return tx, ema, accumulate


def codebook_rule(config: ConfigDict) -> codebook.Rule | None:
    """How the codebook of a first stage learns; None: by the gradient alone, or there is none.

    Raises:
      ValueError: the section is there and the model has no codebook.
    """
    if "codebook" not in config:
        return None
    of = make_section("models", config.model, "model")
    if not isinstance(of, vq.VQAutoencoder) or of.levels:
        what = f"{config.model.name} with levels" if hasattr(of, "levels") else config.model.name
        raise ValueError(
            f"{what} has no codebook; leave the section codebook out, or take vq.VQAutoencoder with codes"
        )
    return make_section("training.codebook", config.codebook, "codebook")


def of_trained(config: ConfigDict, loss: Loss) -> Loss:
    """The loss as a function of the parameters that the optimizer moves."""
    still = plain(config.optimizer).get("frozen", ())
    return optimizers.without_gradient(loss, still) if still else loss
