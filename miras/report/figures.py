"""Figures: curves and heat maps."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

from miras.report import plots
from miras.report.sections import Looks, Section, by_name, is_numbers, require
from miras.report.text import Form, mean, shown

Style = Literal["line", "points", "both"]


@dataclass(frozen=True)
class Series:
    """One curve, of one seed; series of one name and style become one.

    Attributes:
        name: in the legend.
        x: rising numbers.
        y: as many numbers.
        style: "line", "points", or "both".
    """

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    style: Style = "both"

    def __post_init__(self) -> None:
        fits = is_numbers(self.x) and is_numbers(self.y) and len(self.x) == len(self.y)
        require(fits, f"x and y of {self.name!r} must be equally many numbers, got {self.x!r:.60} and {self.y!r:.60}.")
        require(self.style in ("line", "points", "both"), f"style must be line, points or both, got {self.style!r}.")


@dataclass(frozen=True)
class Curves(Section):
    """One number against another, a line a name; with several seeds their mean and, shaded, their range.

    Attributes:
        x: label of the horizontal axis.
        y: label of the vertical axis.
        series: what is drawn.
        log: logarithmic axes: "", "x", "y" or "xy".
        form: how numbers of the vertical axis are written.
    """

    kind: ClassVar[str] = "curves"
    figure: ClassVar[bool] = True

    x: str
    y: str
    series: tuple[Series, ...]
    title: str = ""
    note: str = ""
    log: str = ""
    form: Form = "digits"

    def __post_init__(self) -> None:
        require(self.log in ("", "x", "y", "xy"), f"log must be x, y or xy, got {self.log!r}.")
        values = {"x": [v for s in self.series for v in s.x], "y": [v for s in self.series for v in s.y]}
        for axis in self.log:
            require(all(v > 0 for v in values[axis]), f"a logarithmic {axis} axis needs numbers above 0 only.")

    def joined(self, other: Curves) -> Curves:
        return dataclasses.replace(self, series=self.series + other.series)

    def html(self, name: str, looks: Looks) -> str:
        return _figure(self.svg(name, looks), self.note)

    def svg(self, name: str, looks: Looks) -> str:
        """The drawing without its note, see `plots.curves`."""
        lines = [plots.Line(s.name, s.style, s.x, s.y) for s in self.series]
        return plots.curves(lines, looks, name, self.x, self.y, self.log, self.form)


@dataclass(frozen=True)
class Grid:
    """The numbers of one heat map, of one seed; grids of one name become their mean.

    Attributes:
        name: above it.
        values: rows of numbers, the uppermost first; None: not measured.
    """

    name: str
    values: tuple[tuple[float | None, ...], ...]

    def __post_init__(self) -> None:
        require(all(is_numbers(row) for row in self.values), f"values of {self.name!r} must be rows of numbers.")


@dataclass(frozen=True)
class HeatMap(Section):
    """Numbers over two axes as shades, a map a name.

    Attributes:
        x: label of the horizontal axis.
        y: label of the vertical axis.
        columns: labels along the horizontal axis.
        rows: labels along the vertical one, from above.
        grids: what is drawn.
        low: the number that is blank; None: the lowest there is.
        high: the number that is full; None: the highest.
        form: how numbers are written.
    """

    kind: ClassVar[str] = "heatmap"
    figure: ClassVar[bool] = True

    x: str
    y: str
    columns: tuple[str, ...]
    rows: tuple[str, ...]
    grids: tuple[Grid, ...]
    title: str = ""
    note: str = ""
    low: float | None = None
    high: float | None = None
    form: Form = "digits"

    def __post_init__(self) -> None:
        for grid in self.grids:
            fits = [len(row) for row in grid.values] == [len(self.columns)] * len(self.rows)
            require(fits, f"the grid {grid.name!r} must be {len(self.rows)} rows of {len(self.columns)} numbers.")

    def joined(self, other: HeatMap) -> HeatMap:
        same = (self.columns, self.rows) == (other.columns, other.rows)
        require(same, f"the heat maps {self.title!r} have different axes; give them different titles.")
        return dataclasses.replace(self, grids=self.grids + other.grids)

    def html(self, name: str, looks: Looks) -> str:
        figures = []
        for i, (title, seeds) in enumerate(by_name(self.grids).items()):
            # Row by row and column by column over the seeds.
            values = [
                [_mean_of(cell) for cell in zip(*rows, strict=True)]
                for rows in zip(*(s.values for s in seeds), strict=True)
            ]
            over = f"{title}, mean of {len(seeds)} seeds" if len(seeds) > 1 else title
            axes = plots.Axis(self.x, self.columns), plots.Axis(self.y, self.rows)
            svg = plots.heat(values, axes, f"{name}-{i}", over, self.low, self.high, self.form)
            figures.append(_figure(svg, self.note))
        return "\n".join(figures)


def looks_of(sections: Iterable[Section]) -> Looks:
    """One look for one name, in every figure."""
    drawn = dict.fromkeys(line.name for s in sections if isinstance(s, Curves) for line in s.series)
    return {name: i for i, name in enumerate(drawn)}


def _mean_of(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if known else None


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{shown(caption)}</figcaption></figure>"
