"""What a run tells: metrics as JSON lines (the source of truth), TensorBoard, PNG files, and one progress line.

Weights & Biases is told the same where the config names a project; the package is imported only then.
"""

import json
import math
import os
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from tensorboardX import SummaryWriter
from tqdm import tqdm

from ldm_jax import media

FILE = "metrics.jsonl"


def rounded(values: Mapping[str, float]) -> dict[str, float | None]:
    """Plain floats for JSON, which knows no NaN and no infinity: those become null."""
    plain = {k: float(v) for k, v in values.items()}
    return {k: v if math.isfinite(v) else None for k, v in plain.items()}


def lines(path: Path, until: int) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` up to a step; none if there is no such file."""
    found = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # a line that was cut when the run was killed
    return [line for line in found if line["step"] <= until]


def ends_with(path: Path, step: int, name: str) -> bool:
    """Whether the last line up to a step is of this step and holds that name."""
    found = lines(path, step)
    return bool(found) and found[-1]["step"] == step and name in found[-1]


class Silent:
    """Stands in for `Logs` in all processes but the first."""

    def __init__(self, *_, **__):
        pass

    def advance(self, steps: int = 1) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        pass

    def image(self, step: int, name: str, image: UInt8[np.ndarray, "h w c"]) -> None:
        pass

    def close(self) -> None:
        pass


class Logs:
    """Writes below `workdir`. On resume, lines of steps that will be run again are dropped first."""

    def __init__(
        self, workdir: str | Path, start: int, total: int, unit: str = "step", project: str = ""
    ):
        self.workdir = Path(workdir)
        self.path = self.workdir / FILE
        self._drop_after(start)
        self._file = self.path.open("a", buffering=1)
        self._board = _board(self.workdir, purge_step=start or None)
        self._bar = tqdm(total=total, initial=start, unit=unit, dynamic_ncols=True, mininterval=1.0)
        self._began = time.perf_counter()
        self._remote = _weights_and_biases(project, self.workdir) if project else None

    def _drop_after(self, start: int) -> None:
        if not self.path.exists():
            return
        lines = self.path.read_text().splitlines(keepends=True)
        kept = []
        for line in lines:
            try:
                if json.loads(line)["step"] <= start:
                    kept.append(line)
            except json.JSONDecodeError:
                continue  # a line that was cut when the run was killed
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        os.replace(temporary, self.path)

    def advance(self, steps: int = 1) -> None:
        self._bar.update(steps)

    def say(self, text: str) -> None:
        """A line above the progress bar."""
        tqdm.write(text, file=self._bar.fp)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics; the progress line shows the losses."""
        values = {k: float(v) for k, v in values.items()}
        line = {"step": step, "seconds": round(time.perf_counter() - self._began, 3)}
        self._file.write(json.dumps(line | rounded(values)) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        if self._remote is not None:
            self._remote.log(values, step=step)
        if "loss" in values:
            self._bar.set_postfix_str(f"loss {values['loss']:.4g}", refresh=False)

    def image(self, step: int, name: str, image: UInt8[np.ndarray, "h w c"]) -> Path:
        """A picture: `workdir/images/NAME_STEP.png` and TensorBoard."""
        path = self.workdir / "images" / f"{name}_{step:08d}.png"
        media.save_png(path, image, {"step": str(step)})
        self._board.add_image(name, image, step, dataformats="HWC")
        if self._remote is not None:
            import wandb

            self._remote.log({name: wandb.Image(str(path))}, step=step)
        return path

    def close(self) -> None:
        self._bar.close()
        self._file.close()
        self._board.close()
        if self._remote is not None:
            self._remote.finish()


def _board(workdir: Path, **options: Any) -> SummaryWriter:
    # Files are named by the second: without a suffix a run that starts again within it would write over the first.
    suffix = f".{time.time_ns()}"
    return SummaryWriter(str(workdir / "tensorboard"), filename_suffix=suffix, **options)


def evaluated(workdir: str | Path, step: int, figures: Mapping[str, object]) -> None:
    """The numbers among the figures of an evaluation, in the run's TensorBoard under "evaluation/"."""
    with _board(Path(workdir)) as board:
        for name, value in figures.items():
            if isinstance(value, float):
                board.add_scalar(f"evaluation/{name}", value, step)


def _weights_and_biases(project: str, workdir: Path) -> Any:
    """The run of Weights & Biases that belongs to a work directory: the same one at every start."""
    import wandb

    path = workdir / "wandb.json"
    if not path.is_file():
        path.write_text(json.dumps({"id": uuid.uuid4().hex}) + "\n")
    config = workdir / "config.json"
    return wandb.init(
        project=project,
        id=json.loads(path.read_text())["id"],
        resume="allow",
        name=workdir.name,
        dir=str(workdir),
        config=json.loads(config.read_text()) if config.is_file() else {},
    )
