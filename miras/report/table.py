"""Tables: the best of each column in bold, a mean and an interval where there are several seeds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from miras.evaluate.intervals import interval
from miras.report import plots
from miras.report.sections import Looks, Section, by_name, require
from miras.report.text import FORMS, Form, mean, shown, written


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        name: its head, and the key of its values.
        unit: a second line of the head.
        better: "low" or "high", which end is best; None: neither.
        form: how its numbers are written, see `miras.report.text.written`.
    """

    name: str
    unit: str = ""
    better: Literal["low", "high"] | None = None
    form: Form = "digits"

    def __post_init__(self) -> None:
        require(self.better in (None, "low", "high"), f"better must be low or high, got {self.better!r}.")
        require(self.form in FORMS, f"form must be one of {', '.join(FORMS)}, got {self.form!r}.")


@dataclass(frozen=True)
class Row:
    """A row of a table, of one seed; rows of one name become one.

    Attributes:
        name: its head.
        values: {column: a number or text}; what is missing or None stays empty.
        detail: a line of words below it.
    """

    name: str
    values: Mapping[str, float | str | None]
    detail: str = ""

    def __post_init__(self) -> None:
        require(isinstance(self.values, Mapping), f"values must be {{column: value}}, got {self.values!r:.80}.")


@dataclass(frozen=True)
class Table(Section):
    """Numbers by row and column."""

    kind: ClassVar[str] = "table"

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    title: str = ""
    note: str = ""

    def joined(self, other: Table) -> Table:
        columns = {c.name: c for c in (*other.columns, *self.columns)}
        order = dict.fromkeys(c.name for c in (*self.columns, *other.columns))
        return dataclasses.replace(self, columns=tuple(columns[n] for n in order), rows=self.rows + other.rows)

    def html(self, name: str, looks: Looks) -> str:
        del name  # there is no id in a table
        rows = by_name(self.rows)
        # A column that nobody has a value of says nothing.
        columns = [c for c in self.columns if any(row.values.get(c.name) is not None for row in self.rows)]
        cells = zip(*(_cells(column, rows) for column in columns), strict=True)
        body = []
        for (row, seeds), of_row in zip(rows.items(), cells, strict=True):
            count = f" <small>{len(seeds)} seeds</small>" if len(seeds) > 1 else ""
            head = f'<th scope="row">{dot(row, looks)}{shown(row)}{count}</th>'
            detail = next((seed.detail for seed in seeds if seed.detail), "")
            below = f'<tr class="detail"><td colspan="{1 + len(columns)}"><span>{shown(detail)}</span></td></tr>'
            body.append(f"<tbody><tr>{head}{''.join(c.html for c in of_row)}</tr>{below if detail else ''}</tbody>")
        heads = "".join(f'<th scope="col">{_head(c)} <small>{shown(c.unit)}</small></th>' for c in columns)
        legend = [self.note] if self.note else []
        if any(column.better for column in columns):
            legend.append("↓ lower is better, ↑ higher is better, best in bold.")
        if any(len(seeds) > 1 for seeds in rows.values()):
            legend.append("± 95 % interval of the mean over seeds, by Student's t.")
        said = f'\n<p class="soft">{shown(" ".join(legend))}</p>' if legend else ""
        return f"""<div class="scroll" tabindex="0" role="region" aria-label="{shown(self.title or "Table")}">
<table class="numbers">
<thead><tr><td></td>{heads}</tr></thead>
{chr(10).join(body)}
</table>
</div>{said}"""


def words(table: Table, best: str = "{}") -> list[list[str]]:
    """The table as text: its head, then a line a name, with the mean and the interval over seeds.

    Args:
        table: the table.
        best: how the best of a column is marked, a format string.
    """
    rows = by_name(table.rows)
    lines = zip(*(_cells(column, rows) for column in table.columns), strict=True)
    marked = (
        [name, *(best.format(c.said) if c.best else c.said for c in cells)]
        for name, cells in zip(rows, lines, strict=True)
    )
    return [["", *(column.name for column in table.columns)], *marked]


def dot(name: str, looks: Looks) -> str:
    """The colour of what is drawn somewhere on the page."""
    return f'<span class="dot" style="background:{plots.look(looks[name]).colour}"></span>' if name in looks else ""


def _head(column: Column) -> str:
    return shown(column.name) + {"low": "&nbsp;↓", "high": "&nbsp;↑", None: ""}[column.better]


class _Cell(NamedTuple):
    """What stands in a cell, its number (NaN: none), the interval around it, and whether no other is better."""

    text: str
    number: float
    spread: str = ""
    best: bool = False

    @property
    def said(self) -> str:
        """As plain text."""
        return f"{self.text} ± {self.spread}" if self.spread else self.text

    @property
    def html(self) -> str:
        """With the interval in small print."""
        text = f"<strong>{shown(self.text)}</strong>" if self.best else shown(self.text)
        return f"<td>{text}{f' <small>± {shown(self.spread)}</small>' if self.spread else ''}</td>"


def _cells(column: Column, rows: Mapping[str, list[Row]]) -> list[_Cell]:
    """A column's cells.

    The best is judged as written: of numbers that read the same all are, and none is where all read the same.
    """
    cells = [_cell(column, [row.values.get(column.name) for row in seeds]) for seeds in rows.values()]
    finite = [cell.number for cell in cells if math.isfinite(cell.number)]
    if not column.better or not finite or len({cell.text for cell in cells}) == 1:
        return cells
    best = written((min if column.better == "low" else max)(finite), column.form)
    return [cell._replace(best=cell.text == best) for cell in cells]


def _cell(column: Column, values: Sequence[float | str | None]) -> _Cell:
    numbers = [value for value in values if isinstance(value, int | float)]
    if not numbers:
        return _Cell(", ".join(dict.fromkeys(value for value in values if isinstance(value, str))), math.nan)
    centre, half = mean(numbers), interval(numbers)
    return _Cell(written(centre, column.form), centre, written(half, column.form) if half else "")
