"""A pretrained model as a folder that diffusers loads, or as a single file in the original layout."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm_jax.pretrained import controlnets, kinds, single_files
from ldm_jax.pretrained.components import Component
from ldm_jax.weights import files, original, original_unclip


def save(of: Any, path: str | Path) -> None:
    """Writes the folder of a `Pretrained`: configs and tokenizers as they were read, parameters as they are now.

    Raises:
      ValueError: the folder exists and is not empty.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists and is not empty; give a new folder, nothing was written")
    index = dict(of.index)
    if of.controlnets:
        several = controlnets.KIND if len(of.controlnets) == 1 else controlnets.SEVERAL
        index["_class_name"] = kinds.controlled(index["_class_name"])
        index[controlnets.NAME] = ["diffusers", several]
    params = of.component_params()
    for i, component in enumerate(of.controlnets):
        at = path / controlnets.name(i)
        tensors = component.export(of.params["controls"][i])
        files.write(at / f"{component.stem}.safetensors", tensors)
        _json(at / "config.json", component.config)
    for name, component in of.components.items():
        at = path / kinds.stored_name(name, of.index)
        files.write(at / f"{component.stem}.safetensors", component.export(params[name]))
        _json(at / "config.json", component.config)
    for name, tokenizer in of.tokenizers.items():
        tokenizer.save(path / name)
    for name, config in of.schedulers.items():
        _json(path / name / "scheduler_config.json", config)
    for name, config in of.processors.items():
        _json(path / name / "preprocessor_config.json", config)
    written = {kinds.stored_name(name, of.index) for name in of.components}
    written |= {*of.schedulers, *of.tokenizers, *of.processors}
    written |= {controlnets.NAME} if of.controlnets else set()
    index = {
        name: value
        if name.startswith("_") or not isinstance(value, list) or name in written
        else [None, None]
        for name, value in index.items()
    }
    _json(path / "model_index.json", index)


def save_original(of: Any, path: str | Path) -> None:
    """Writes a single file in the original layout; tokenizers and schedulers have no place there.

    A ControlNet is below "control_model.", as in lllyasviel's files of whole models.

    Raises:
      ValueError: the file exists, or there is what the layout has no place for.
    """
    path = Path(path)
    if of.vision.keys() not in (set(), original_unclip.PREFIXES.keys()):
        raise ValueError(
            f"a {of.index.get('_class_name')} cannot be written in the original layout, which has no place for its "
            "image encoder; give layout='diffusers'"
        )
    if len(of.controlnets) > 1:
        raise ValueError(
            f"a file in the original layout has a place for one ControlNet, and there are {len(of.controlnets)}; "
            "give layout='diffusers'"
        )
    if path.exists():
        raise ValueError(f"{path} exists; give the name of a new file, nothing was written")
    params = of.component_params()
    prefixes = _prefixes(of.components)
    parts = [
        (single_files.table(name, component, prefixes[name])[0], params[name])
        for name, component in of.components.items()
    ]
    parts += [
        (original.controlnet(net.module), of.params["controls"][i])
        for i, net in enumerate(of.controlnets)
    ]
    files.write(path, original.to_original(parts))


def _prefixes(networks: Mapping[str, Component]) -> dict[str, str]:
    """Where the original layout keeps each component: XL numbers its text encoders."""
    texts = [name for name in networks if name.startswith("text_encoder")]
    xl = "text_encoder_2" in texts
    found = {"unet": original.UNET, "vae": original.VAE} | original_unclip.PREFIXES
    for i, name in enumerate(texts):
        stem = f"conditioner.embedders.{i}." if xl else original.TEXT
        open_clip = getattr(networks[name].module, "activation", None) == "gelu"
        found[name] = stem + ("model." if open_clip else "transformer.")
    return found


def _json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")
