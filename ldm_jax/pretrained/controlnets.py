"""ControlNets beside a model: folders, those within the model's own folder, and single files."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ldm_jax.pretrained.components import Component, Tensors
from ldm_jax.weights import controlnet, files, folder, original, pickles, recognise_controlnet

KIND, SEVERAL = "ControlNetModel", "MultiControlNetModel"  # classes of diffusers
NAME = "controlnet"  # of the first one's folder
# What a file has beside its ControlNet if it is that of a whole model.
OTHERS = tuple(
    re.escape(prefix) + ".*"
    for prefix in (original.UNET, original.VAE, original.TEXT, "conditioner.")
)
Given = str | Path | tuple[str | Path, Mapping[str, Any]]


class Stored(NamedTuple):
    """A ControlNet in its files, not read yet."""

    config: Mapping[str, Any]
    tensors: Callable[[Component], Tensors]


def open_any(given: Given, variant: str | None = None) -> Stored:
    """A folder with a config.json and safetensors; or a single file, or (file, settings in diffusers' words).

    Raises:
      FileNotFoundError, ValueError: neither, or no ControlNet that is known here.
    """
    path, asked = given if isinstance(given, tuple) else (given, {})
    path = Path(path)
    if path.is_file():
        read = files.read if path.suffix == ".safetensors" else pickles.read
        return of_tensors(read(path), asked)
    if asked:
        raise ValueError(f"{path} is no file, and folders have their own config; leave {asked} out")
    return of_folder(path, variant)


def of_folder(path: Path, variant: str | None = None) -> Stored:
    """A folder that diffusers wrote for one ControlNet."""
    config = folder.read_json(path / "config.json", "a ControlNet")
    return Stored(config, lambda net: net.stored(folder.weights(path, net.stem, variant)))


def of_tensors(tensors: Mapping[str, Any], asked: Mapping[str, Any] = {}) -> Stored:
    """What a single file holds; see `weights.recognise_controlnet`."""
    found = recognise_controlnet.recognise(tensors, asked)

    def stored(net):
        if found.prefix is None:
            return Tensors(tensors, controlnet.table_of(found.config), net.ignore)
        rows = original.controlnet(net.module, found.prefix)
        return Tensors(tensors, rows, (*net.ignore, *OTHERS, *original.BESIDE))

    return Stored(found.config, stored)


def folders(path: Path) -> list[Path]:
    """Where a pipeline's folder keeps several ControlNets: controlnet, controlnet_1 ..."""
    found = [path / NAME]
    while (following := path / name(len(found))).is_dir():
        found.append(following)
    return found


def name(i: int) -> str:
    """Of the folder of the i-th ControlNet."""
    return f"{NAME}_{i}" if i else NAME
