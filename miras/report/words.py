"""Sections of words: what a reader should know, what models wrote, how to do it again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from miras.report.sections import Looks, Section, by_name, require
from miras.report.table import dot
from miras.report.text import shown


@dataclass(frozen=True)
class Notes(Section):
    """A list of remarks.

    Attributes:
        items: (what it is about, in bold; the remark).
    """

    kind: ClassVar[str] = "notes"

    items: tuple[tuple[str, str], ...]
    title: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        require(all(len(item) == 2 for item in self.items), "items must be pairs [head, remark].")

    def joined(self, other: Notes) -> Notes:
        return dataclasses.replace(self, items=tuple(dict.fromkeys(map(tuple, self.items + other.items))))

    def html(self, name: str, looks: Looks) -> str:
        items = (f"<li><strong>{shown(head)}</strong> {shown(rest)}</li>" for head, rest in self.items)
        return "<ul>\n" + "\n".join(items) + "\n</ul>"


@dataclass(frozen=True)
class Sample:
    """A text that a model wrote after a prompt."""

    name: str
    text: str
    prompt: str = ""


@dataclass(frozen=True)
class Samples(Section):
    """Texts of models, of each name the first."""

    kind: ClassVar[str] = "samples"

    samples: tuple[Sample, ...]
    title: str = ""
    note: str = ""

    def joined(self, other: Samples) -> Samples:
        return dataclasses.replace(self, samples=self.samples + other.samples)

    def html(self, name: str, looks: Looks) -> str:
        parts = [f'<p class="soft">{shown(self.note)}</p>'] if self.note else []
        for model, (sample, *_) in by_name(self.samples).items():
            # HTML drops a line break right after <pre>: one that may be dropped goes before the text.
            block = f"<pre>\n<strong>{shown(sample.prompt)}</strong>{shown(sample.text)}</pre>"
            parts.append(f'<div class="sample"><h3>{dot(model, looks)}{shown(model)}</h3>{block}</div>')
        return "\n".join(parts)


@dataclass(frozen=True)
class Facts(Section):
    """How to do it again.

    Attributes:
        commands: to be typed.
        facts: {what: value}; of several files, the different values one after the other.
    """

    kind: ClassVar[str] = "facts"

    commands: tuple[str, ...]
    facts: Mapping[str, str | tuple[str, ...]]
    title: str = ""
    note: str = ""

    def joined(self, other: Facts) -> Facts:
        both = {
            n: _values(self.facts.get(n, ())) + _values(other.facts.get(n, ())) for n in {**self.facts, **other.facts}
        }
        facts = {n: tuple(dict.fromkeys(values)) for n, values in both.items()}
        return dataclasses.replace(self, commands=tuple(dict.fromkeys(self.commands + other.commands)), facts=facts)

    def html(self, name: str, looks: Looks) -> str:
        rows = (
            f'<tr><th scope="row">{shown(n)}</th><td>{shown("; ".join(_values(v)))}</td></tr>'
            for n, v in self.facts.items()
        )
        commands = f"<pre>\n{shown(chr(10).join(self.commands))}</pre>\n" if self.commands else ""
        return f'{commands}<table class="facts"><tbody>\n{chr(10).join(rows)}\n</tbody></table>'


def _values(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(map(str, value))
