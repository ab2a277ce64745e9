"""Fields of a frozen dataclass from words of a command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import yaml

from miras.errors import UsageError

T = TypeVar("T")


def changed(part: T, settings: Mapping[str, str]) -> T:
    """A copy with some fields set, each of the kind that it has in `part`.

    Args:
        part: a frozen dataclass of plain values and tuples of them.
        settings: {field: as one writes it}: a word, a number, several separated by commas ("256,1024"), or groups of
            several ("[64,4],[128,8]").

    Raises:
        UsageError: a value of another kind than the field's, or out of its range.
    """
    return dataclasses.replace(part, **{n: _value(n, text, getattr(part, n)) for n, text in settings.items()})  # type: ignore[type-var]


def shown(value: Any) -> str:
    """A field's value as one writes it in a setting."""
    if not isinstance(value, tuple):
        return str(value)
    return ",".join(f"[{shown(item)}]" if isinstance(item, tuple) else shown(item) for item in value)


def _value(name: str, text: str, default: Any) -> Any:
    if isinstance(default, str):
        return text
    try:
        value = _tuples(yaml.safe_load(f"[{text}]" if isinstance(default, tuple) else text))
        if isinstance(default, float):
            value = float(text)  # YAML 1.1 reads 3e-3 as a word
    except (yaml.YAMLError, ValueError):
        value = None
    if not _alike(value, default) and not (isinstance(value, tuple) and value and _all_alike(value, default)):
        raise UsageError(f"--set {name}={text}: expected something like {name}={shown(default)}.")
    return value


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _all_alike(values: tuple[Any, ...], default: Any) -> bool:
    """Whether each is of the kind of the default's items, of which there may be any number."""
    return isinstance(default, tuple) and all(_alike(value, default[0]) for value in values)


def _alike(value: Any, default: Any) -> bool:
    if isinstance(default, tuple):
        return isinstance(value, tuple) and len(value) == len(default) and all(map(_alike, value, default))
    if isinstance(default, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is type(default)
