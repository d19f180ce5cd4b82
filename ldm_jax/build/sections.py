"""From a section of a config to the object that it names.

A section such as `dict(name="unet.UNet", width=64)` names an attribute of a module below `ldm_jax`, which is called
with the rest. Python's namespace is the registry; nothing outside `ldm_jax` can be named.
"""

import difflib
import importlib
import inspect
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from beartype.door import is_bearable
from ml_collections import ConfigDict

Plain = bool | int | float | str | tuple | None  # what a config file can say


def did_you_mean(given: str, choices: Iterable[str]) -> str:
    """ "; did you mean 'x'? the choices are ..." — the tail of an error message."""
    choices = sorted(choices)
    near = difflib.get_close_matches(given, choices, n=1)
    return (f"; did you mean {near[0]!r}?" if near else ";") + f" the choices are {choices}"


def plain(section: Any) -> Any:
    """A config's values as keyword arguments: dicts, tuples and scalars."""
    if isinstance(section, ConfigDict | Mapping):
        return {k: plain(v) for k, v in section.items()}
    if isinstance(section, list | tuple):
        return tuple(plain(v) for v in section)
    return section


def section(value: Any, where: str) -> dict[str, Any]:
    """A section as keyword arguments; a bare name is a section without arguments.

    Raises:
      ValueError: it has no name.
    """
    value = plain(value)
    if isinstance(value, str):
        return {"name": value}
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError(f"{where} = {value!r} lacks a name that says what is to be called")
    return value


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type; whole numbers count as float."""
    if isinstance(value, int) and not isinstance(value, bool) and is_bearable(float(value), hint):
        return True
    return is_bearable(value, hint)


def checked(
    where: str, value: Any, types: Mapping[str, Any], needed: Iterable[str] = ()
) -> dict[str, Any]:
    """A section without a name as a dict, after a look at its keys and types.

    Raises:
      ValueError: an unknown key ("did you mean"), a missing one, or a value of a wrong type.
    """
    given = plain(value)
    if not isinstance(given, dict):
        raise ValueError(f"{where} = {given!r} is no section with the entries {sorted(types)}")
    for key, entry in given.items():
        if key not in types:
            raise ValueError(f"{where}.{key} is unknown{did_you_mean(key, types)}")
        if not fits(entry, types[key]):
            raise ValueError(
                f"{where}.{key} = {entry!r} has a wrong type; expected {shown(types[key])}"
            )
    if missing := sorted(set(needed) - set(given)):
        raise ValueError(f"{where} lacks {missing}")
    return given


def shown(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint)


def _attribute(package: str, name: str) -> Any:
    """`name` below `ldm_jax.package`: "unet.UNet" in a package; "Label" in a module, or in a package with `__all__`.

    It is defined there, not imported from elsewhere.
    """
    parts = name.split(".")
    root = importlib.import_module(f"ldm_jax.{package}")
    public = getattr(root, "__all__", None)  # then what a package's modules define is its own
    if public is None and hasattr(root, "__path__"):
        children = [p.stem for p in Path(root.__path__[0]).iterdir() if not p.stem.startswith("_")]
        if len(parts) != 2:
            raise ValueError(
                f"the name {name!r} is not of the form 'module.attribute' below {package}{did_you_mean(name, children)}"
            )
        if parts[0] not in children:
            raise ValueError(f"there is no {package}.{parts[0]}{did_you_mean(parts[0], children)}")
        root = importlib.import_module(f"{root.__name__}.{parts[0]}")
    defined = {
        k: v
        for k, v in vars(root).items()
        if not k.startswith("_")
        and (k in public if public else getattr(v, "__module__", None) == root.__name__)
        and callable(v)
    }
    if parts[-1] not in defined:
        raise ValueError(
            f"there is no {name!r} in {root.__name__}{did_you_mean(parts[-1], defined)}"
        )
    return defined[parts[-1]]


def parameters(of: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """What a section may say for a function or a module."""
    found = inspect.signature(of).parameters
    return {k: p for k, p in found.items() if k not in ("parent", "name")}


def accepted(package: str, name: str) -> dict[str, inspect.Parameter]:
    """The keyword parameters of what a section names."""
    return parameters(_attribute(package, name))


def make(package: str, name: str, /, **kwargs: Any) -> Any:
    """Calls what `name` names below `ldm_jax.package`.

    Raises:
      ValueError: an unknown name or argument ("did you mean"), a missing argument, or one of a wrong type.
    """
    of = _attribute(package, name)
    check_arguments(of, name, kwargs)
    return of(**kwargs)


def check_arguments(of: Callable[..., Any], name: str, given: Mapping[str, Any]) -> None:
    """Raises: ValueError: as in `make`."""
    takes = parameters(of)
    for key, value in given.items():
        if key not in takes:
            raise ValueError(f"{name} takes no {key!r}{did_you_mean(key, takes)}")
        hint = takes[key].annotation
        simple = isinstance(hint, type | types.UnionType | types.GenericAlias)
        if simple and isinstance(value, Plain) and not fits(value, hint):
            raise ValueError(f"{name}: {key} = {value!r} has a wrong type; expected {shown(hint)}")
    missing = [
        k
        for k, p in takes.items()
        if p.default is inspect.Parameter.empty
        and k not in given
        and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if missing:
        raise ValueError(f"{name} needs {missing} in its config section")


def make_section(package: str, value: Any, where: str, **more: Any) -> Any:
    """Calls what a section names below `ldm_jax.package` with the section's other entries."""
    given = section(value, where)
    return make(package, given.pop("name"), **more, **given)
