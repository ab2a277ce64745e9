"""What a report is made of: sections, the same as Python objects and as JSON.

A section is one JSON object whose `kind` names a class and whose other keys are the fields of that class:

    {"kind": "table", "title": "Recall", "columns": [{"name": "Accuracy", "better": "high", "form": "percent"}],
     "rows": [{"name": "yaad", "values": {"Accuracy": 0.97}}, {"name": "yaad", "values": {"Accuracy": 0.95}}]}

    {"kind": "curves", "title": "Recall", "x": "context, tokens", "y": "bits per byte", "log": "x",
     "series": [{"name": "yaad", "x": [256, 1024], "y": [2.1, 2.0]}]}

    {"kind": "heatmap", "title": "Needles", "x": "length", "y": "depth", "columns": ["1K", "2K"], "rows": ["0", "50 %"],
     "grids": [{"name": "yaad", "values": [[1, 0.9], [1, 0.7]]}], "low": 0, "high": 1}

A file `{"sections": [...]}` is all that `miras report` needs. Rows, series and grids of one name are seeds of the same
thing, in one file or in several: they become a mean with an interval. Sections of several files with the same kind,
title and note become one; sections with the same title stand under one heading.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from miras.errors import UsageError, near

Looks = Mapping[str, int]
"""What is drawn has one look in all figures: the number of each name."""


class Section(ABC):
    """A part of a report. A final class is a frozen dataclass of plain values.

    Attributes:
        kind: what JSON calls it.
        figure: it is one or more <figure>s, which stand side by side with the figures after it.
        title: the heading it stands under.
        note: what a reader has to know, below it.
    """

    kind: ClassVar[str]
    figure: ClassVar[bool] = False
    title: str
    note: str

    @abstractmethod
    def html(self, name: str, looks: Looks) -> str:
        """The section without its title; all ids in it begin with `name`."""

    @abstractmethod
    def joined(self, other: Any) -> Section:
        """One section of two with the same kind, title and note."""


S = TypeVar("S")


def merged(sections: Iterable[Section]) -> list[Section]:
    """Sections that say the same of other things as one, and those of one title side by side, in order."""
    one: dict[tuple[str, str, str], Section] = {}
    for section in sections:
        key = (section.kind, section.title, section.note)
        one[key] = one[key].joined(section) if key in one else section
    titles = list(dict.fromkeys(section.title for section in one.values()))
    return sorted(one.values(), key=lambda section: titles.index(section.title))


def by_name(items: Iterable[S], name: str = "name") -> dict[str, list[S]]:
    """Items in order of their names' first appearance; those of one name are seeds."""
    groups: dict[str, list[S]] = {}
    for item in items:
        groups.setdefault(getattr(item, name), []).append(item)
    return groups


def plain(section: Section) -> dict[str, Any]:
    """A section as JSON has it, fields at their defaults left out."""
    assert dataclasses.is_dataclass(section)
    fields = dataclasses.asdict(section)
    defaults = {f.name: f.default for f in dataclasses.fields(section)}
    return {"kind": section.kind} | {n: x for n, x in fields.items() if n in ("title", "note") or x != defaults[n]}


def built(cls: type[S], content: Any, where: str, parts: Mapping[str, type]) -> S:
    """An object of a dataclass from JSON.

    Args:
        cls: the dataclass.
        content: its fields as a dict; lists become tuples.
        where: what to call it in errors.
        parts: classes of the items that fields hold lists of.

    Raises:
        UsageError: no dict, or a field that does not exist, is missing or has a value that does not fit.
    """
    if not isinstance(content, dict):
        raise UsageError(f"{where}: expected an object with the fields of {cls.__name__}, got {content!r:.80}.")
    known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    fields = {}
    for key, value in content.items():
        if key not in known:
            raise UsageError(f"{where}: {cls.__name__} has no field {key!r}." + near(str(key), known))
        if key in parts:
            if not isinstance(value, list):
                raise UsageError(f"{where}: expected a list as {key}, got {value!r:.80}.")
            value = [built(parts[key], x, f"{where}, {key} {i}", {}) for i, x in enumerate(value)]
        fields[key] = tuple(value) if isinstance(value, list) else value
    missing = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING and f.name not in fields]  # type: ignore[arg-type]
    if missing:
        raise UsageError(f"{where}: {cls.__name__} needs the fields {', '.join(missing)}.")
    try:
        return cls(**fields)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error


def require(fits: bool, what: str) -> None:
    """Refuse values that do not fit.

    Raises:
        UsageError: `what`.
    """
    if not fits:
        raise UsageError(what)


def is_numbers(values: Any) -> bool:
    """Whether these are numbers in a list; None stands for one that is missing."""
    listed = isinstance(values, Sequence) and not isinstance(values, str)
    return listed and all(x is None or (isinstance(x, int | float) and not isinstance(x, bool)) for x in values)
