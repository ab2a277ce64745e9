"""Names for frozen dataclasses: configuration round trip and enumeration, with no table to keep by hand.

Every final class of an axis registers itself by being defined (`Axis.__init_subclass__`); its name in configurations is
the class name, qualified by its axis, so `bias.L2` and `retention.L2` do not clash.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from abc import ABC
from collections.abc import Callable
from functools import reduce
from typing import Any, ClassVar, TypeVar

from miras.errors import UsageError, near

T = TypeVar("T", bound="Axis")


class Axis(ABC):
    """Base of everything that a `Rule` is made of: a frozen dataclass of plain values (and functions by their name)."""

    axis: ClassVar[str]
    members: ClassVar[dict[str, type[Axis]]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if Axis in cls.__bases__:
            cls.members = {}
        elif not inspect.isabstract(cls):
            cls.members[cls.__name__] = cls

    @property
    def formula(self) -> str:
        """What it computes, in one line: the first of the class' docstring, so that one place is kept true."""
        return (inspect.getdoc(type(self)) or type(self).__name__).split("\n")[0]

    def __str__(self) -> str:
        """The name with the fields that differ from their defaults: `Huber(form='norm')`."""
        changed = [
            f"{f.name}={_shown(getattr(self, f.name))}"
            for f in dataclasses.fields(self)  # type: ignore[arg-type]
            if getattr(self, f.name) != f.default
        ]
        return f"{type(self).__name__}({', '.join(changed)})"


def choices(axis: type[T]) -> dict[str, type[T]]:
    """The final classes of one axis by name, in order of definition; marker bases are no dataclasses."""
    return {name: cls for name, cls in axis.members.items() if dataclasses.is_dataclass(cls)}  # type: ignore[misc]


def to_config(part: Any) -> dict[str, Any]:
    """A frozen dataclass as plain JSON-able values: its class name under "name", then its fields.

    Raises:
        UsageError: a field is a function that cannot be found again by its name.
    """
    config: dict[str, Any] = {"name": type(part).__name__}
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if dataclasses.is_dataclass(value):
            value = to_config(value)
        elif callable(value):
            value = _name_of(value)
        config[field.name] = value
    return config


def from_config(axis: type[T], config: dict[str, Any]) -> T:
    """The object that `to_config` described.

    Raises:
        UsageError: an unknown name or field, said with the ones there are.
    """
    fields = dict(config)
    name = fields.pop("name", None)
    known = choices(axis)
    if name not in known:
        raise UsageError(f"{axis.__name__.lower()} is {name!r}, which does not exist." + near(str(name), list(known)))
    cls = known[name]
    names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in fields:
        if key not in names:
            raise UsageError(f"{axis.__name__.lower()} {name} has no field {key!r}." + near(key, names))
    return cls(**fields)


def function_at(name: str) -> Callable[..., Any]:
    """The function that a configuration calls "package.module:function"; its module is imported.

    Raises:
        UsageError: there is no such function.
    """
    module, _, path = name.partition(":")
    try:
        found = reduce(getattr, path.split("."), importlib.import_module(module))
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UsageError(
            f"function {name!r} cannot be imported: {error}. Expected 'package.module:function'."
        ) from None
    if not callable(found):
        raise UsageError(f"{name!r} is {type(found).__name__}, not a function.")
    return found


def _name_of(function: Callable[..., Any]) -> str:
    """What `function_at` finds it by."""
    name = f"{getattr(function, '__module__', '')}:{getattr(function, '__qualname__', '')}"
    try:
        found = function_at(name)
    except UsageError:
        found = None
    if found is not function:
        raise UsageError(
            f"{_shown(function)} cannot be saved: a configuration names a function by its module. "
            "Define it with def at the top level of a module."
        )
    return name


def _shown(value: Any) -> str:
    """A field's value for people; a function's representation would be an address."""
    return getattr(value, "__name__", repr(value)) if callable(value) else repr(value)
