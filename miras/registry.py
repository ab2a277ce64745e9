"""Names for frozen dataclasses: configuration round trip and enumeration, with no table to keep by hand.

Every final class of an axis registers itself by being defined (`Axis.__init_subclass__`); its name in configurations is
the class name, qualified by its axis, so `bias.L2` and `retention.L2` do not clash.
"""

from __future__ import annotations

import dataclasses
import inspect
from abc import ABC
from typing import Any, ClassVar, TypeVar

from miras.errors import UsageError, near

T = TypeVar("T", bound="Axis")


class Axis(ABC):
    """Base of everything that a `Rule` is made of: a frozen dataclass of plain values."""

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
            f"{f.name}={getattr(self, f.name)!r}"
            for f in dataclasses.fields(self)  # type: ignore[arg-type]
            if getattr(self, f.name) != f.default
        ]
        return f"{type(self).__name__}({', '.join(changed)})"


def choices(axis: type[T]) -> dict[str, type[T]]:
    """The final classes of one axis by name, in order of definition; marker bases are no dataclasses."""
    return {name: cls for name, cls in axis.members.items() if dataclasses.is_dataclass(cls)}  # type: ignore[misc]


def to_config(part: Any) -> dict[str, Any]:
    """A frozen dataclass as plain JSON-able values: its class name under "name", then its fields."""
    config: dict[str, Any] = {"name": type(part).__name__}
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        config[field.name] = to_config(value) if dataclasses.is_dataclass(value) else value
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
