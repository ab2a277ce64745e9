"""What `miras eval --json` says, as sections of a page."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping
from typing import Any, Literal

from miras.evaluate.tasks import task as task_of
from miras.report.figures import Curves, Grid, HeatMap, Series
from miras.report.sections import Section
from miras.report.table import Column, Row, Table


def task_sections(found: Mapping[str, Any], names: Mapping[str, str] | None = None) -> list[Section]:
    """Tables and figures of models on a task, each seed by itself.

    Args:
        found: what `miras.evaluate.compare` returns.
        names: what to call the models; several may have one name, and are then seeds.

    Raises:
        UsageError: an unknown task.
    """
    task, called = task_of(found["task"]), found["task"].replace("_", " ")
    sections: list[Section] = []
    for measure in task.measures:
        lines: list[_Line] = []
        word, better = measure.replace("_", " "), "low" if measure in task.less else "high"
        title = f"{called}, {word}" if len(task.measures) > 1 else called
        for model, result in found["models"].items():
            name, rows = str((names or {}).get(model, model)), result["rows"]
            lines += [
                (name, [(row, row[measure]["values"][seed]) for row in rows])
                for seed in range(len(rows[0][measure]["values"]))
            ]
        first, *others = task.level
        if not isinstance(lines[0][1][0][0][first], str):
            sections += _figures(lines, task.level, title, word, better)
            continue
        # A level that is a word is a table of its own.
        for kind in dict.fromkeys(row[first] for row, _ in lines[0][1]):
            own = [(name, [(row, x) for row, x in line if row[first] == kind]) for name, line in lines]
            sections += _figures(own, tuple(others), f"{title}, {kind}", word, better)
    # Files of before it was a result that a training diverged do not say so.
    lost = {str((names or {}).get(model, model)): len(r.get("diverged", ())) for model, r in found["models"].items()}
    note = diverged(lost)
    return [dataclasses.replace(s, note=s.note + note) if isinstance(s, Table) else s for s in sections]


def diverged(lost: Mapping[str, int]) -> str:
    """What a table says beneath it of models that lost seeds, {name: how many}; empty: none did."""
    return "".join(f" {name}: {count} of its seeds diverged." for name, count in lost.items() if count)


_Line = tuple[str, list[tuple[Any, float]]]
"""A model's name, and a seed's rows with what was measured there."""


def _figures(
    lines: list[_Line], level: tuple[str, ...], title: str, word: str, better: Literal["low", "high"]
) -> list[Section]:
    """One measure by one or two levels that are numbers."""
    if len(level) == 2 and not _one_each(lines[0][1], level):
        return [_means(lines, level, title, word, better), *(_map(n, line, level, title, word) for n, line in lines)]
    x = level[0]
    # Where the first level tells all lines apart, labels need no other.
    levels = (x,) if len({row[x] for row, _ in lines[0][1]}) == len(lines[0][1]) else level
    labels = [" x ".join(_said(row[name]) for name in levels) for row, _ in lines[0][1]]
    columns = tuple(Column(label, "", better) for label in labels)
    values = [dict(zip(labels, (value for _, value in line), strict=True)) for _, line in lines]
    note = f"{word.capitalize()} by {' x '.join(levels)}."
    table = Table(columns, tuple(Row(n, v) for (n, _), v in zip(lines, values, strict=True)), title, note)
    if len(levels) > 1:
        return [table]  # no curve has two values at one place
    curves = [Series(name, tuple(row[x] for row, _ in line), tuple(value for _, value in line)) for name, line in lines]
    log = "x" if min(min(s.x) for s in curves) > 0 else ""
    errors = [y for s in curves for y in s.y] if better == "low" else []
    if errors and 0 < 30 * min(errors) < max(errors):
        log += "y"
    return [table, Curves(x, word, tuple(curves), title, log=log)]


def _one_each(line: list[tuple[Any, float]], level: tuple[str, ...]) -> bool:
    """Whether two levels are a list of pairs and no grid."""
    first, second = (len({row[name] for row, _ in line}) for name in level)
    return len(line) < first * second or min(first, second) == 1


def _means(lines: list[_Line], level: tuple[str, ...], title: str, word: str, better: Literal["low", "high"]) -> Table:
    """Of a grid, which no table holds: by its first level alone."""
    x, other = level
    places = list(dict.fromkeys(row[x] for row, _ in lines[0][1]))
    rows = tuple(
        Row(name, {_said(at): statistics.fmean(value for row, value in line if row[x] == at) for at in places})
        for name, line in lines
    )
    columns = tuple(Column(_said(at), "", better) for at in places)
    return Table(columns, rows, title, f"{word.capitalize()} by {x}, mean over {other}.")


def _map(name: str, line: list[tuple[Any, float]], level: tuple[str, ...], title: str, word: str) -> HeatMap:
    cells = {(row[level[0]], row[level[1]]): value for row, value in line}
    columns, rows = (list(dict.fromkeys(row[n] for row, _ in line)) for n in level)
    grid = Grid(name, tuple(tuple(cells[c, r] for c in columns) for r in rows))
    said = (tuple(map(_said, columns)), tuple(map(_said, rows)))
    return HeatMap(level[0], level[1], *said, (grid,), title, f"{word.capitalize()}.")


def _said(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"
