"""A pretrained model as a folder that diffusers loads."""

import json
from pathlib import Path
from typing import Any

from ldm_jax.weights import files


def save(of: Any, path: str | Path) -> None:
    """Writes the folder of a `Pretrained`: configs and tokenizers as they were read, parameters as they are now.

    Raises:
      ValueError: the folder exists and is not empty.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists and is not empty; give a new folder, nothing was written")
    params = of.component_params()
    for name, component in of.components.items():
        files.write(path / name / f"{component.stem}.safetensors", component.export(params[name]))
        _json(path / name / "config.json", component.config)
    for name, tokenizer in of.tokenizers.items():
        tokenizer.save(path / name)
    for name, config in of.schedulers.items():
        _json(path / name / "scheduler_config.json", config)
    written = {*of.schedulers, *of.components, *of.tokenizers}
    index = {
        name: value
        if name.startswith("_") or not isinstance(value, list) or name in written
        else [None, None]
        for name, value in of.index.items()
    }
    _json(path / "model_index.json", index)


def _json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")
