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
        if not isinstance(default, tuple):
            return _as(yaml.safe_load(text), default)
        items = yaml.safe_load(f"[{text}]")
        if not items:
            raise ValueError
        return tuple(_as(item, default[0]) for item in items)
    except (yaml.YAMLError, ValueError) as error:
        raise UsageError(f"--set {name}={text}: expected something like {name}={shown(default)}.") from error


def _as(value: Any, kind: Any) -> Any:
    """A value that YAML has read, as one of the kind of another; ValueError where it is none."""
    if isinstance(kind, tuple) and isinstance(value, list) and len(value) == len(kind):
        return tuple(map(_as, value, kind))
    if isinstance(kind, float) and isinstance(value, int | str) and not isinstance(value, bool):
        return float(value)  # YAML 1.1 reads 3e-3 as a word
    if type(value) is not type(kind):
        raise ValueError
    return value
