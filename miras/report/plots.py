"""The figures of a report, as SVG text that goes straight into an HTML page.

A figure carries no colour for text and background: its ink is the page's, so one drawing serves light, dark and print.
"""

import io
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Affine2D

from miras.report.text import Form, byte_size, mean, written

# Okabe and Ito's palette without black (the ink) and yellow (too pale on white); grey closes it.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
_DASHES = ("solid", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)), (0, (2.5, 1.5)), (0, (9, 2)), (0, (3, 4)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")

# Matplotlib accepts fixed colours only: these two stand for the page's, and are replaced in the finished SVG.
_INK, _RULE = "#010203", "#040506"
_PAGE_COLOURS = {_INK: "currentColor", _RULE: "var(--rule)"}
_FILE_COLOURS = {"currentColor": "#222222", "var(--rule)": "#E4E4E4"}

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: small, searchable, in a font of the reader
    "text.parse_math": False,  # a "$" in a model's name is a "$"
    "font.size": 8,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _RULE,
    "grid.linewidth": 0.5,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.frameon": False,
    "legend.handlelength": 3.2,
    "legend.columnspacing": 1.2,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
}
# A drawing in a file of its own has no page around it.
FILE_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: small, searchable
    "svg.hashsalt": "miras",  # ids that do not change from run to run
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "figure.facecolor": "white",
}
_LEGEND_COLUMNS = 3  # at most
_LEAST_SPAN = 10.0  # highest over lowest value of a logarithmic axis
_HEAT, _FULL = "#0072B2", 0.75  # of heat maps: the ink of the numbers reads on the fullest shade too
_SHADES = 25
_NUMBERED = 12  # columns of a heat map that leave room for numbers
_LABELS = 10  # of an axis
_DRAWN_POINTS = 200  # of a curve: more cannot be seen at this size and only make the page heavy


class Look(NamedTuple):
    """How one model is drawn, the same in every figure."""

    colour: str
    dash: Any
    marker: str


class Line(NamedTuple):
    """A curve: `style` is "line", "points" or "both"."""

    name: str
    style: str
    x: Sequence[float]
    y: Sequence[float]


class Axis(NamedTuple):
    """An axis of a heat map: what it is, and the label of each row or column."""

    name: str
    labels: Sequence[str]


def look(index: int) -> Look:
    """Return the look of the model at `index`: distinct in dash and marker too, and as a pair beyond seven models."""
    shape = index + index // len(_COLOURS)
    return Look(_COLOURS[index % len(_COLOURS)], _DASHES[shape % len(_DASHES)], _MARKERS[shape % len(_MARKERS)])


def file_svg(figure: Figure, creator: str) -> str:
    """Return `figure` as an SVG file that is the same, byte for byte, whenever the same versions draw it."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": creator})
    # Hundredths of a point are enough, and the same on every machine; indentation is a sixth of the file. What is
    # written stays as it is: a label may be 0.001.
    text = re.sub(r"\d+\.\d{3,}(?=[^<>]*>)", lambda number: f"{float(number[0]):.2f}", buffer.getvalue())
    return "\n".join(line.strip() for line in text.splitlines()) + "\n"


def standalone(svg: str) -> str:
    """A figure of a page as a file of its own: dark ink on white."""
    for of_page, colour in _FILE_COLOURS.items():
        svg = svg.replace(of_page, colour)
    return svg.replace("<svg ", '<svg style="background:white" ', 1) + "\n"


def curves(
    lines: Sequence[Line], looks: Mapping[str, int], name: str, x: str, y: str, log: str = "", form: Form = "digits"
) -> str:
    """Draw lines over one pair of axes; those of one name and style as their mean and, shaded, their range.

    Args:
        lines: what is drawn.
        looks: index of each line's look, by its name.
        name: prefix of all ids in the SVG, unique on the page.
        x: label of the horizontal axis.
        y: label of the vertical axis.
        log: which axes are logarithmic: "", "x", "y" or "xy".
        form: how numbers of the vertical axis are written.
    """
    names = list(dict.fromkeys(line.name for line in lines))

    def draw(axes: Axes) -> None:
        for rank, (label, style) in enumerate(dict.fromkeys((line.name, line.style) for line in lines)):
            same = [line for line in lines if (line.name, line.style) == (label, style)]
            _draw(axes, same, look(looks[label]), 1 - rank / len(lines))
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        _scale(axes, log, [value for line in lines for value in line.x], form)

    return _figure(draw, [(label, look(looks[label])) for label in names], name, f"{y} against {x}, one line a name")


def heat(
    values: Sequence[Sequence[float | None]],
    axes: tuple[Axis, Axis],
    name: str,
    title: str,
    low: float | None = None,
    high: float | None = None,
    form: Form = "digits",
) -> str:
    """Draw numbers as shades of one colour over the page's own, with the numbers where there is room for them.

    Args:
        values: rows of numbers, the uppermost first; None: not measured, marked by a dot.
        axes: the horizontal and the vertical axis.
        name: prefix of all ids in the SVG, unique on the page.
        title: above it.
        low: the number that is blank; None: the lowest there is.
        high: the number that is full; None: the highest.
        form: how numbers are written.
    """
    (x, columns), (y, rows) = axes
    known = [value for row in values for value in row if value is not None]
    low = min(known, default=0.0) if low is None else low
    high = max(known, default=1.0) if high is None else high
    room = len(columns) <= _NUMBERED

    def draw(axes: Axes) -> None:
        cells: dict[int, list[Path]] = defaultdict(list)
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                share = 0.0 if value is None or high <= low else min(max((value - low) / (high - low), 0.0), 1.0)
                cells[round(share * _SHADES)].append(
                    Path.unit_rectangle().transformed(Affine2D().translate(column, row))
                )
                if room or value is None:
                    text = "·" if value is None else written(value, form)
                    axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=7)
        for shade, same in cells.items():
            # One path a shade keeps the page small.
            path = Path.make_compound_path(*same)
            axes.add_patch(PathPatch(path, facecolor=_HEAT, alpha=_FULL * shade / _SHADES, linewidth=0))
        axes.set(xlim=(0, len(columns)), ylim=(len(rows), 0), xlabel=x, ylabel=y)
        axes.grid(visible=False)
        shown = range(0, len(columns), -(-len(columns) // _LABELS))
        axes.set_xticks([i + 0.5 if room else i for i in shown], [columns[i] for i in shown])
        axes.set_yticks([i + 0.5 for i in range(len(rows))], rows)
        axes.tick_params(length=0)
        ends = "" if room else f"  (blank {written(low, form)}, full {written(high, form)})"
        axes.set_title(title + ends, loc="left", fontsize=8)

    height = 0.9 + 0.24 * len(rows)
    return _figure(draw, [], name, f"{title}: {y} by {x}", height)


def _draw(axes: Axes, seeds: Sequence[Line], how: Look, size: float) -> None:
    """Draw the seeds of one thing: hollow points, larger for what is drawn earlier, tell lines that coincide."""
    first = seeds[0]
    stride = max(1, len(first.x) // _DRAWN_POINTS)
    plain = {"color": how.colour, "markersize": 4 + 1.5 * size}
    if first.style != "points":
        plain |= {"linestyle": how.dash}
    if first.style == "both":
        plain |= {"marker": how.marker, "markerfacecolor": "none"}
    if first.style == "points":
        plain |= {"marker": how.marker, "linestyle": ""}
    if any(line.x != first.x for line in seeds):
        for line in seeds:
            axes.plot(line.x[::stride], line.y[::stride], **plain)
        return
    xs, columns = first.x[::stride], list(zip(*(line.y[::stride] for line in seeds), strict=True))
    axes.plot(xs, [mean(column) for column in columns], **plain)
    if len(seeds) > 1 and first.style != "points":
        low, high = [min(c) for c in columns], [max(c) for c in columns]
        axes.fill_between(xs, low, high, color=how.colour, alpha=0.15, linewidth=0)


def _scale(axes: Axes, log: str, xs: Sequence[float], form: Form) -> None:
    """Set the scales, and ticks that read well: on a logarithmic axis the very numbers that were measured."""
    places = sorted(set(xs))
    if "x" in log:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(places[:: -(-len(places) // _LABELS)]))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        whole = all(float(value).is_integer() for value in places)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=whole))
    # A change of scale sets formatters of its own, so these come after it.
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    if "y" in log:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        # A narrower axis would blow the noise of a constant up into a trend.
        widen = max(1.0, (_LEAST_SPAN * low / high) ** 0.5)
        axes.set_ylim(low / widen, high * widen)
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 300 else (1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(
            FuncFormatter(lambda value, _: byte_size(value) if form == "bytes" else f"{value:g}")
        )
    elif form in ("bytes", "percent"):
        axes.yaxis.set_major_formatter(
            FuncFormatter(lambda value, _: f"{value:.0%}" if form == "percent" else byte_size(value))
        )


def _figure(
    draw: Callable[[Axes], None], legend: Sequence[tuple[str, Look]], name: str, label: str, height: float = 2.8
) -> str:
    """Return the SVG of one figure with a legend above it; no setting of matplotlib is left changed."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(4.4, height), layout="constrained")
        draw(figure.add_subplot())
        handles = [
            Line2D([], [], color=how.colour, linestyle=how.dash, marker=how.marker, label=text) for text, how in legend
        ]
        if handles:
            rows = -(-len(handles) // _legend(figure, handles))
            figure.set_figheight(height + 0.17 * rows)
        return _inline_svg(figure, name, escape(label))


def _legend(figure: Figure, handles: Sequence[Line2D]) -> int:
    """Put a legend above a figure and return its columns, as many as there is room for."""
    for columns in range(_LEGEND_COLUMNS, 1, -1):
        box = figure.legend(handles=handles, loc="outside upper left", ncols=columns)
        if box.get_window_extent().width <= figure.bbox.width:
            return columns
        box.remove()
    figure.legend(handles=handles, loc="outside upper left")
    return 1


def _inline_svg(figure: Figure, name: str, label: str) -> str:
    """Return `figure` as an <svg> element: colours of the page, ids of its own, no size but its proportions."""
    buffer = io.StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    for stand_in, colour in _PAGE_COLOURS.items():
        svg = svg.replace(stand_in, colour)
    # Ids count from one in each figure, and a page has several figures.
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    head, _, body = svg[svg.index("<svg") :].partition(">")
    view_box = head.partition('viewBox="')[2].partition('"')[0]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{view_box}" '
        f'role="img" aria-label="{label}"><title>{label}</title>{body}'
    )
