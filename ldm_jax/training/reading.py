"""Reading from a run's checkpoints: one item of one step, onto devices or into memory, after a look at its manifest.

Nothing is moved or written here. Only this file and `checkpoints`, which writes, know orbax.
"""

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from ldm_jax import tree
from ldm_jax.training import manifest

FOLDER = "checkpoints"


class Unreadable(ValueError):
    """A checkpoint that is damaged, or another run's."""


def one_line(error: BaseException) -> str:
    """An error in a few words: what the system says of it, else its first line."""
    for number in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
        if os.strerror(number) in str(error):
            return os.strerror(number)
    first = str(error).strip().partition("\n")[0][:160]
    return f"{type(error).__name__}: {first}"


def abstract(shapes: Any, shardings: Any) -> Any:
    def leaf(shape, sharding):
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    return jax.tree.map(leaf, shapes, shardings)


def _check(held: Any, wanted: Any, path: Path) -> None:
    """Names, shapes and types agree; orbax itself would cast silently."""
    here = dict(zip(tree.names(held), jax.tree.leaves(held), strict=True))
    ours = dict(zip(tree.names(wanted), jax.tree.leaves(wanted), strict=True))
    for name in sorted(here.keys() | ours.keys()):
        got, want = (
            f"{side[name].dtype}{list(side[name].shape)}" if name in side else "nothing"
            for side in (here, ours)
        )
        if got != want:
            raise Unreadable(
                f"the checkpoint {path} holds {name!r} as {got}, the config wants {want}; use the config that wrote it"
            )


def item(path: Path, wanted: Any, part: str | None = None) -> Any:
    """One item of one step, or one `part` at its top, born with the shardings of `wanted`.

    Raises:
      Unreadable: another structure, shape or dtype, or a file that is missing or damaged.
    """
    try:
        handler = ocp.PyTreeCheckpointHandler()
        held = handler.metadata(epath.Path(path)).tree
        if part is not None:
            held, wanted = {part: held.get(part, {})}, {part: wanted}
        _check(held, wanted, path)
        with ocp.Checkpointer(handler) as reader:
            asked = ocp.args.PyTreeRestore(
                item=wanted,
                restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
                partial_restore=part is not None,
            )
            restored = jax.block_until_ready(reader.restore(path, args=asked))
            return restored if part is None else restored[part]
    except Unreadable:
        raise
    except Exception as error:  # damage shows as one of many kinds
        why = (
            "although its files are those that were written; was it by another version of orbax?"
            if manifest.checked(path.parent)
            else f"and it has no manifest; remove the folder {path.parent} to go on from the step before"
        )
        raise Unreadable(
            f"the checkpoint {path} cannot be read ({one_line(error)}), {why}"
        ) from error


def tell(path: Path, step: int, passed: Sequence[str]) -> None:
    """One line about the steps that were passed over, if there are any."""
    if passed:
        logging.warning("%s: %s; step %d is used", path, "; ".join(passed), step)


def keys(path: Path) -> tuple[str, ...]:
    """The names at the top of one item."""
    return tuple(ocp.PyTreeCheckpointHandler().metadata(epath.Path(path)).tree)


def arrays(path: Path, part: str | None = None) -> dict[str, np.ndarray]:
    """The arrays of one item, or of one `part` at its top, in memory; by their names, without that of the part."""
    handler = ocp.PyTreeCheckpointHandler()
    held = handler.metadata(epath.Path(path)).tree
    wanted = held if part is None else {part: held[part]}
    to_memory = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    with ocp.Checkpointer(handler) as reader:
        asked = ocp.args.PyTreeRestore(
            item=wanted, restore_args=to_memory, partial_restore=part is not None
        )
        restored = reader.restore(path, args=asked)
    restored = restored if part is None else restored[part]
    return dict(zip(tree.names(restored), jax.tree.leaves(restored), strict=True))


def load_ema(
    workdir: str | Path,
    shapes: Any,
    shardings: Any,
    step: int | None = None,
    name: str | None = None,
) -> tuple[Any, int]:
    """The moving average of a run's parameters and the step that it is of; reads nothing else, and moves nothing.

    `name` is that of one of the averages of a run that keeps several.

    Raises:
      FileNotFoundError: there is no run, or no checkpoint (or not that step) in it.
      Unreadable: another structure, shape or dtype than that of the run's config, or damage.
    """
    path, step = sound_step(workdir, step, "ema")
    return item(path / str(step) / "ema", abstract(shapes, shardings), name), step


def sound_step(workdir: str | Path, step: int | None, below: str) -> tuple[Path, int]:
    """The folder of a run's checkpoints, and the newest step in it, or that one, whose part `below` is sound.

    Raises:
      FileNotFoundError, Unreadable: as `load_ema`.
    """
    path = Path(workdir).absolute() / FOLDER
    steps = manifest.steps(path)
    if not steps:
        raise FileNotFoundError(
            f"{workdir} holds no checkpoint; train there first: python train.py --config ... --workdir {workdir}"
        )
    if step is not None:
        if step not in steps:
            raise FileNotFoundError(f"{path} holds no step {step}; it has {steps}")
        if wrong := manifest.problem(path / str(step), below):
            raise Unreadable(
                f"step {step} in {path} is damaged ({wrong}); choose another one of {steps}"
            )
        return path, step
    found = manifest.newest_sound(path, below)
    if found.step is None:
        raise Unreadable(f"no checkpoint in {path} is sound: {'; '.join(found.passed)}")
    tell(path, found.step, found.passed)
    return path, found.step
