"""The config of a run: checked by section, written into the work directory, compared when a run is resumed."""

import hashlib
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ldm_jax.build.sections import checked, did_you_mean, plain, section
from ldm_jax.training import processes

COMMON = {"seed", "steps", "data", "model", "objective", "optimizer", "mesh", "sharding", "log"}
COMMON |= {"guards", "evaluation"}
KINDS = {
    "autoencoder": COMMON | {"discriminator", "perceptual", "codebook", "start"},
    "diffusion": COMMON
    | {"tokenizer", "codec", "conditioner", "path", "target", "sampler", "init", "start"},
}
OPTIONAL = {"discriminator", "perceptual", "codebook", "start", "guards"}
OPTIONAL |= {"tokenizer", "conditioner", "init", "evaluation"}
PRETRAINED = {"tokenizer", "model", "conditioner", "codec"}  # what `init` says ...
RETRAINED = {"path", "target"}  # ... and what it says unless these sections say otherwise
LOG = dict(every=50, evaluate=1000, save=1000, keep=3, batches=4, samples=16, max_skipped=10)
# Which checkpoints stay beside the last ones, which of an evaluation's metrics says what is best, who else is told,
# and of which groups of layers the gradient's norm is.
TOLD = dict(keep_every=0, keep_best=0, metric="", goal="min", wandb="", norms=False)
GUARDS = dict(rollbacks=0, spike=0.0, hang=0.0, patience=0)  # 0: off
JUDGED = "evaluation/"  # how the figures of the section `evaluation` are called in the log
NUMBERS = dict(seed=int, steps=int)
# Between two starts of one run; what lies at `init.path` and beside is known by its hash.
ELSEWHERE = ("init.path", "init.config", "init.tokenizers", "data.cached", "data.workers")
MAY_CHANGE = ("steps", "log", "guards", "evaluation", "mesh", "sharding", *ELSEWHERE)


def read_config(workdir: str | Path) -> ConfigDict:
    """The config of a run.

    Raises:
      FileNotFoundError: the directory holds no run.
    """
    path = Path(workdir) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{workdir} holds no run (no config.json); train there first: "
            f"python train.py --config ... --workdir {workdir}"
        )
    return ConfigDict(_read(path))


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is damaged ({error}); remove the run or repair the file"
        ) from error


def config_hash(config: ConfigDict) -> str:
    """sha256 of the resolved config."""
    return hashlib.sha256(json.dumps(plain(config), sort_keys=True).encode()).hexdigest()


def compare(config: ConfigDict, source: Any, workdir: str | Path) -> None:
    """Looks whether the run in a work directory, if there is one, is the same; writes nothing.

    Raises:
      ValueError: the directory belongs to a run of another config, or one on other data; or several processes do not
        agree on these.
    """
    path = Path(workdir) / "config.json"
    before = path.read_text() if path.is_file() else "nothing"
    agreed = {"the config": config_hash(config), "the data": source.fingerprint}
    processes.agree(agreed | {"the work directory": before})
    if Path(workdir).exists() and not Path(workdir).is_dir():
        raise ValueError(f"{workdir} is a file; give a folder as --workdir")
    if path.is_file():
        differ = _differences(_read(path), _as_json(config))
        if differ:
            shown = "; ".join(f"{key}: {old!r} there, {new!r} here" for key, old, new in differ[:4])
            raise ValueError(
                f"{workdir} holds a run of another config ({shown}); give another --workdir or the old config"
            )
    path = Path(workdir) / "data.json"
    if path.is_file():
        before = _read(path)
        if before["fingerprint"] != source.fingerprint:
            raise ValueError(
                f"the run in {workdir} was started on other data: {before['name']} with fingerprint "
                f"{before['fingerprint'][:12]}, and {source.name} has {source.fingerprint[:12]}; "
                "give the old data, or another --workdir"
            )


def claim(config: ConfigDict, source: Any, workdir: str | Path) -> None:
    """Writes `config.json` and `data.json`: from now on the directory is this run's.

    The latter has the data's name, fingerprint, classes, and the names of what is in boxes, `kinds`.
    """
    remember(Path(workdir) / "config.json", _as_json(config))
    data = {"name": source.name, "fingerprint": source.fingerprint, "classes": source.classes}
    data["kinds"] = dict(getattr(source, "kinds", ()))
    remember(Path(workdir) / "data.json", data)


def _as_json(config: ConfigDict) -> Any:
    return json.loads(config.to_json_best_effort())


def remember(path: Path, value: Any) -> None:
    """Writes JSON at once or not at all; of several processes the first one does."""
    if not processes.first():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(temporary, path)


def _differences(a: Any, b: Any, at: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(a, dict) and isinstance(b, dict):
        names = {k: f"{at}.{k}" if at else k for k in sorted(a.keys() | b.keys())}
        return [
            d
            for k, name in names.items()
            if name not in MAY_CHANGE
            for d in _differences(a.get(k), b.get(k), name)
        ]
    return [] if a == b else [(at, a, b)]


def check_config(config: ConfigDict) -> str:
    """The kind of run, after a look at the names of the sections.

    Raises:
      ValueError: an unknown or missing section, an unknown kind of objective, or a value of a wrong type.
    """
    given = plain(config)
    if "objective" not in given:
        raise ValueError(
            f"the config lacks the section 'objective', whose name is one of {sorted(KINDS)}"
        )
    kind = section(given["objective"], "objective")["name"]
    if kind not in KINDS:
        raise ValueError(f"objective.name = {kind!r} is unknown{did_you_mean(kind, KINDS)}")
    for key in given:
        if key not in KINDS[kind]:
            raise ValueError(
                f"the config has an unknown section {key!r}{did_you_mean(key, KINDS[kind])}"
            )
    if "init" in given and (twice := sorted(PRETRAINED & set(given))):
        raise ValueError(
            f"the sections {twice} contradict 'init', whose model has its own; leave them out, or leave out 'init'"
        )
    if "init" in given and "start" in given:
        raise ValueError(
            "the sections init and start both say what a run begins with; leave one out"
        )
    elsewhere = PRETRAINED | RETRAINED if "init" in given else set()
    missing = sorted(KINDS[kind] - OPTIONAL - elsewhere - set(given))
    if missing:
        raise ValueError(f"the config lacks the sections {missing}")
    checked("config", {k: given[k] for k in NUMBERS}, NUMBERS)
    types = {k: type(v) for k, v in (LOG | TOLD).items()}
    log = checked("log", given["log"], types | dict(norms=bool | tuple))
    if log.get("wandb") and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            "log.wandb needs the package wandb: pip install 'ldm_jax[wandb]', or leave it out"
        )
    guards = checked("guards", given.get("guards", {}), {k: type(v) for k, v in GUARDS.items()})
    positive = {"steps": given["steps"]} | {f"log.{k}": log[k] for k in LOG if k in log}
    for key, value in positive.items():
        if value < 1:
            raise ValueError(f"{key} = {value} must be at least 1")
    counts = {f"log.{k}": log[k] for k in ("keep_every", "keep_best") if k in log}
    counts |= {f"guards.{k}": v for k, v in guards.items()}
    for key, value in counts.items():
        if value < 0:
            raise ValueError(f"{key} = {value} must not be negative; 0 turns it off")
    by_metric = [k for k in ("log.keep_best", "guards.patience") if counts.get(k)]
    if by_metric and not log.get("metric"):
        raise ValueError(
            f"{by_metric[0]} needs log.metric, the name of a metric of the evaluation such as 'validation/loss'"
        )
    if log.get("metric", "").startswith(JUDGED) and "evaluation" not in given:
        raise ValueError(
            f"log.metric = {log['metric']!r} is a figure of the section evaluation, which the config lacks; add it, or "
            "name another metric"
        )
    if log.get("goal", "min") not in ("min", "max"):
        raise ValueError(f"log.goal = {log['goal']!r} is unknown; choose 'min' or 'max'")
    if given["seed"] < 0:
        raise ValueError(f"seed = {given['seed']} must not be negative")
    return kind


def classes(directory: str | Path) -> tuple[str, ...] | None:
    """The class names of the data that the run was trained on."""
    path = Path(directory) / "data.json"
    names = _read(path)["classes"] if path.is_file() else None
    return None if names is None else tuple(names)


def kinds(directory: str | Path) -> dict[str, list[str]]:
    """The names of the values of the boxes' entries in these data; none where nobody wrote them down."""
    path = Path(directory) / "data.json"
    return _read(path).get("kinds", {}) if path.is_file() else {}
