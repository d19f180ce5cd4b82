"""The `config.json` of a component: what of it we read, what we take as given, and what we do not know."""

from collections.abc import Collection, Mapping
from typing import Any


def read(
    config: Mapping[str, Any],
    what: str,
    takes: Mapping[str, Any],
    only: Mapping[str, Collection[Any]] = {},
    idle: Collection[str] = (),
) -> dict[str, Any]:
    """The values of the keys in `takes`, which gives their defaults; lists as tuples.

    The keys in `only` must have one of the values there, where they are given at all; those in `idle` do not matter.
    Other keys are features that we do not know: they must be off (None, False, or empty). `what` names the component.

    Raises:
      ValueError: a value that `only` does not have, or a feature that we do not know; all of them at once.
    """
    given = {k: _plain(v) for k, v in config.items() if not k.startswith("_")}
    known = {*takes, *only, *idle}
    wrong = [
        f"{key} = {given[key]!r} (we have {' or '.join(map(repr, allowed))})"
        for key, allowed in only.items()
        if key in given and given[key] not in allowed
    ]
    unknown = [
        f"{key} = {value!r} (unknown)"
        for key, value in given.items()
        if key not in known and value not in (None, False, (), {})
    ]
    if wrong or unknown:
        raise ValueError(
            f"the config of this {what} asks for what we lack: {', '.join(wrong + unknown)}; "
            "such a model cannot be loaded"
        )
    return {key: given.get(key, default) for key, default in takes.items()}


def _plain(value: Any) -> Any:
    return tuple(_plain(v) for v in value) if isinstance(value, list | tuple) else value
