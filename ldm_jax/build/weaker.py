"""Whether two runs fit each other for autoguidance, where one model leads away from the other."""

import math
from pathlib import Path
from typing import Any

from ldm_jax.build import diffusion, workdir
from ldm_jax.build.sections import plain
from ldm_jax.pipeline import Pipeline

USUAL = 2.0  # the scale where none is given
SCALE = 1e-3  # by which the scales of latents may differ, relatively


def away_from(weak: str, scale: float | None = None) -> dict[str, Any]:
    """The section of autoguidance for a flag: a work directory, or the number of an earlier checkpoint."""
    named = {"checkpoint": int(weak)} if weak.isdigit() else {"run": weak}
    return {"name": "auto", "scale": USUAL if scale is None else scale, **named}


def check(directory: str | Path, of: Pipeline, run: str | Path, weak: Pipeline) -> None:
    """Looks whether the model `weak` of `run` reads the same noisy latents, times and conditions as `of`.

    Raises:
      ValueError: it does not, or it is the model itself.
    """
    ours, theirs = Path(directory), Path(run)
    if ours.resolve() == theirs.resolve():
        if weak.step == of.step:
            raise ValueError(
                f"autoguidance leads away from a weaker model, and step {of.step} of {run} is the model itself; "
                "give an earlier checkpoint, or another run"
            )
        return
    scales = [(diffusion.stored(at) or {}).get("scale", 1.0) for at in (ours, theirs)]
    fits = {
        "path": _section("path", ours) == _section("path", theirs),
        "latents": of.shape == weak.shape and _origin(ours) == _origin(theirs),
        "scale of latents": math.isclose(*scales, rel_tol=SCALE),
        "conditions": of.model.fields == weak.model.fields,
        "tokenizer": _text(ours) == _text(theirs),
    }
    for what, same in fits.items():
        if not same:
            raise ValueError(
                f"autoguidance of {directory} by {run} cannot be: the two runs differ in their {what}; give a run that "
                "differs in its network alone, or in how long it was trained"
            )


def _section(name: str, directory: Path) -> Any:
    """A section of the run's config; that of a run from pretrained weights may be theirs."""
    config = workdir.read_config(directory)
    return plain(config.get(name, config.get("init")))


def _origin(directory: Path) -> Any:
    """Which autoencoder a run's latents are of."""
    kept = diffusion.stored(directory)
    return _section("codec", directory) if kept is None else (kept["run"], kept["step"])


def _text(directory: Path) -> str | None:
    path = directory / "tokenizer.json"
    return path.read_text() if path.is_file() else None
