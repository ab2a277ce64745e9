"""The figures of a report, as SVG text that goes straight into an HTML page.

A figure carries no colour for text and background: its ink is the page's, so one drawing serves light, dark and print.
"""

import io
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from miras.report.text import byte_size

# Okabe and Ito's palette without black (the ink) and yellow (too pale on white); grey closes it.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
_DASHES = ("solid", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)), (0, (2.5, 1.5)), (0, (9, 2)), (0, (3, 4)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")

# Matplotlib accepts fixed colours only: these two stand for the page's, and are replaced in the finished SVG.
_INK, _RULE = "#010203", "#040506"
_PAGE_COLOURS = {_INK: "currentColor", _RULE: "var(--rule)"}

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
    "svg.fonttype": "none",
    "svg.hashsalt": "miras",
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
_LEGEND_COLUMNS = 3
_LEAST_SPAN = 10.0  # highest over lowest value of a logarithmic axis
_DRAWN_POINTS = 200  # of a curve: more cannot be seen at this size and only make the page heavy


class Look(NamedTuple):
    """How one model is drawn, the same in every figure."""

    colour: str
    dash: Any
    marker: str


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


def smoothing_reach(points: int) -> int:
    """Return how many neighbours on each side the smoothed curve of `points` measurements averages."""
    return points // 50


def loss_figure(models: Sequence[dict], name: str, start: float = 0.0) -> str:
    """Draw bits per byte against the step: training as smoothed lines, validation as points.

    Args:
        models: entries of `results["models"]`.
        name: prefix of all ids in the SVG, unique on the page.
        start: the fraction of the run at which the drawing begins; the vertical axis fits what is left.
    """

    def draw(axes: Axes) -> None:
        first = start * max((step for model in models for step in model["curve"]["step"]), default=0)
        for index, model in enumerate(models):
            colour, dash, marker = look(index)
            curve, points = model["curve"], model["validation"]
            smooth = _smooth(curve["bits_per_byte"])
            steps, values = _since(first, curve["step"][: len(smooth)], smooth)
            stride = max(1, len(steps) // _DRAWN_POINTS)
            axes.plot(steps[::stride], values[::stride], color=colour, linestyle=dash)
            axes.plot(
                *_since(first, points["step"], points["bits_per_byte"]), color=colour, marker=marker, linestyle=""
            )
        axes.set_xlabel("training step")
        axes.set_ylabel("bits per byte")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))

    part = f", from {start:.0%} of the run on" if start else ""
    return _figure(draw, models, name, f"Bits per byte against training step{part}, one line a model")


def decode_figure(models: Sequence[dict], name: str) -> str:
    """Draw the milliseconds one generated token takes against the context before it, both axes logarithmic."""

    def draw(axes: Axes) -> None:
        _against_context(axes, models, "decode_ms_per_token")
        axes.set_ylabel("decoding, ms per token")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))

    return _figure(draw, models, name, "Milliseconds per generated token against context, one line a model")


def state_figure(models: Sequence[dict], name: str) -> str:
    """Draw the bytes a model keeps to go on with a text against the length of that text, both axes logarithmic."""

    def draw(axes: Axes) -> None:
        _against_context(axes, models, "state_bytes")
        axes.set_ylabel("state, bytes")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: byte_size(value)))

    return _figure(draw, models, name, "Bytes of state against context, one line a model")


def _against_context(axes: Axes, models: Sequence[dict], field: str) -> None:
    """Plot `field`, a map from context to value, for each model that has measurements."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for index, model in enumerate(models):
        colour, dash, marker = look(index)
        points = sorted((int(context), value) for context, value in model[field].items())
        xs, ys = [x for x, _ in points], [y for _, y in points]
        # Hollow, and larger for earlier models: where lines coincide, all of them can still be told.
        size = 4 + 1.5 * (len(models) - 1 - index) / len(models)
        axes.plot(xs, ys, color=colour, linestyle=dash, marker=marker, markersize=size, markerfacecolor="none")
    contexts = sorted({int(context) for model in models for context in model[field]})
    axes.xaxis.set_major_locator(FixedLocator(contexts))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    low, high = axes.get_ylim()
    # A narrower axis would blow the noise of a constant up into a trend.
    widen = max(1.0, (_LEAST_SPAN * low / high) ** 0.5)
    axes.set_ylim(low / widen, high * widen)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 300 else (1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("context, tokens")


def _smooth(values: Sequence[float]) -> list[float]:
    """Average each value with as many neighbours before as after it, so that nothing is delayed.

    At the start, where the loss falls steeply, the windows are shorter. At the end they would only make the last points
    noisy, which reads as a trend: the curve stops at the last full window.
    """
    reach = smoothing_reach(len(values))
    windows = (values[i - min(i, reach) : i + min(i, reach) + 1] for i in range(len(values) - reach))
    return [sum(window) / len(window) for window in windows]


def _since(first: float, steps: Sequence[int], values: Sequence[float]) -> tuple[list[int], list[float]]:
    """Return what of `steps` and `values` is at step `first` or later."""
    kept = [pair for pair in zip(steps, values, strict=True) if pair[0] >= first]
    return [step for step, _ in kept], [value for _, value in kept]


def _figure(draw: Callable[[Axes], None], models: Sequence[dict], name: str, label: str) -> str:
    """Return the SVG of one figure with a legend above it; no setting of matplotlib is left changed."""
    rows = -(-len(models) // _LEGEND_COLUMNS)
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(4.4, 2.8 + 0.17 * rows), layout="constrained")
        draw(figure.add_subplot())
        handles = []
        for index, model in enumerate(models):
            colour, dash, marker = look(index)
            handles.append(Line2D([], [], color=colour, linestyle=dash, marker=marker, label=model["name"]))
        figure.legend(handles=handles, loc="outside upper left", ncols=_LEGEND_COLUMNS)
        return _inline_svg(figure, name, label)


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
