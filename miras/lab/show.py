"""What the lab found, as a table and as a drawing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter

from miras.lab.compare import LAST_PAIR
from miras.report.plots import FILE_STYLE, file_svg, look
from miras.report.text import three_digits
from miras.train.files import write_text

COLUMNS = 4
# Errors beyond are drawn at the edge: what is learned exactly, and what diverged.
LOWEST, HIGHEST = 0.01, 4.0
# Of the highest: a surprise that vanishes leaves the picture.
LEAST = 1e-4
NOTHING = "-"


def columns(results: dict[str, Any]) -> list[str]:
    """The heads of `rows`."""
    asked = [name for name in results["rules"][0]["late"] if name != LAST_PAIR]
    marked = any(r["surprise"] and r["surprise"]["marked, late"] is not None for r in results["rules"])
    limited = any(r["limited"] for r in results["rules"])
    tail = ["found", LAST_PAIR, "moved", "near zero", "surprise"]
    return ["rule", "eta", *asked, *tail, *["at marked"] * marked, *["limited"] * limited]


def rows(results: dict[str, Any]) -> list[list[str]]:
    """A row of words for each rule: means over the later times of asking."""
    return [[_cell(results, rule, head) for head in columns(results)] for rule in results["rules"]]


def _cell(results: dict[str, Any], rule: dict[str, Any], head: str) -> str:
    if head == "rule":
        return rule["name"]
    if head == "eta":
        # A star where a larger or smaller one than was tried might be better.
        tried = [eta for eta, _ in rule["tried"]]
        return f"{rule['gates']['eta']:.3g}" + "*" * (rule["gates"]["eta"] in (tried[:1] + tried[-1:]))
    if head in rule["late"]:
        return _number(rule["late"][head][0])
    if head == "found":
        found = [rule["found"][name] for name in results["scored"]]
        return _percent(None if None in found else sum(found) / len(found))
    if head in ("moved", "near zero"):
        late = rule["late_" + head.replace(" ", "_")]
        return _number(late) if head == "moved" else _percent(late)
    if head == "limited":
        return _percent(rule["limited"] and rule["limited"]["ordinary, late"])
    return _number(rule["surprise"] and rule["surprise"][("marked" if head == "at marked" else "ordinary") + ", late"])


def _percent(share: float | None) -> str:
    return NOTHING if share is None else f"{100 * share:.0f} %"


def _number(value: float | None) -> str:
    return NOTHING if value is None else three_digits(value) if value >= 0.01 else f"{value:.3f}"


LEGEND = """\
Means over seeds and the later part of the stream. Errors are relative: 1 is that of reading zeros, 1.4 that
of a value that has nothing to do with it. eta with *: at an end of what was tried. found: answers that are nearest to
their own value. moved: distance of the weights from the first ones. near zero: weights below a hundredth of the largest
of their matrix. surprise: norm of a token's inner gradient. limited: coordinates on Huber's linear branch."""


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw all curves of a scenario, a panel for each quantity and a line for each rule, as SVG."""
    rules = results["rules"]
    panels: list[tuple[str, Callable[[Axes], None]]] = [
        (f"error: {name}", lambda axes, name=name: _errors(axes, results, name)) for name in rules[0]["error"]
    ]
    panels.append(("error against lag, later part", lambda axes: _lags(axes, results)))
    panels.append(("distance from the first memory", lambda axes: _over_time(axes, results, "moved")))
    panels.append(("share of weights near zero", lambda axes: _over_time(axes, results, "near_zero")))
    for quantity, title in (("surprise", "surprise"), ("limited", "coordinates limited")):
        if any(rule[quantity] for rule in rules):
            panels.append((title, lambda axes, quantity=quantity: _of_tokens(axes, results, quantity)))
    lines = -(-len(panels) // COLUMNS)
    with matplotlib.rc_context({**FILE_STYLE, "xtick.labelsize": 7, "ytick.labelsize": 7, "lines.linewidth": 1.2}):
        figure = Figure(figsize=(2.6 * COLUMNS, 2.1 * lines + 0.5), layout="constrained")
        every = figure.subplots(lines, COLUMNS, squeeze=False).flatten()
        for axes, (title, draw) in zip(every, panels, strict=False):
            draw(axes)
            axes.set_title(title, fontsize=8)
        for axes in every[len(panels) :]:
            axes.remove()
        handles = [Line2D([], [], label=rule["name"], **style) for rule, style in _styled(results)]
        figure.legend(handles=handles, loc="outside upper left", ncols=4)
        write_text(path, file_svg(figure, "miras lab"))


def _errors(axes: Axes, results: dict[str, Any], name: str) -> None:
    """An error over time, with the range of the seeds."""
    for rule, style in _styled(results):
        curve = {kind: _drawn(values) for kind, values in rule["error"][name].items()}
        axes.plot(results["at"], curve["mean"], **style)
        if name != LAST_PAIR:  # one pair a seed: the ranges would cover each other
            axes.fill_between(results["at"], curve["low"], curve["high"], color=style["color"], alpha=0.12, linewidth=0)
    axes.set_xlabel("tokens read")
    _error_axis(axes)


def _lags(axes: Axes, results: dict[str, Any]) -> None:
    """The error of a pair over the tokens since; lag 0 stands at 1/2 on the logarithmic axis."""
    for rule, style in _styled(results):
        axes.plot([lag or 0.5 for lag in results["lags"]], _drawn(rule["lag"]), **style)
    axes.set_xscale("log", base=2)
    axes.set_xticks([0.5, 2, 8, 32, 128, 512], ["0", "2", "8", "32", "128", "512"])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("tokens since the pair was read")
    _error_axis(axes)


def _over_time(axes: Axes, results: dict[str, Any], quantity: str) -> None:
    for rule, style in _styled(results):
        axes.plot(results["at"], _gaps(rule[quantity]), **style)
    axes.set_xlabel("tokens read")
    _size_axis(axes, quantity)


def _of_tokens(axes: Axes, results: dict[str, Any], quantity: str) -> None:
    """A mean over the ordinary tokens since the last time, and thinner over the marked ones, where there were any."""
    thin = False
    for rule, style in _styled(results):
        if rule[quantity]:
            axes.plot(results["at"], _gaps(rule[quantity]["ordinary"]), **style)
            marked = [(t, x) for t, x in zip(results["at"], rule[quantity]["marked"], strict=True) if x is not None]
            axes.plot([t for t, _ in marked], [x for _, x in marked], **{**style, "linewidth": 0.6})
            thin |= bool(marked)
    axes.set_xlabel("tokens read" + (" (thin: at marked ones)" if thin else ""))
    _size_axis(axes, quantity)


def _styled(results: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Each rule and how its line is drawn."""
    for i, rule in enumerate(results["rules"]):
        colour, dash, _ = look(i)
        yield rule, {"color": colour, "linestyle": dash}


def _error_axis(axes: Axes) -> None:
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, LOWEST * 0.9), min(high, HIGHEST * 1.1))
    ticks = (0.01, 0.03, 0.1, 0.3, 1, 3) if high / low > 4 else (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.4, 2)
    axes.set_yticks([x for x in ticks if low <= x <= high])
    _plain_numbers(axes)


def _size_axis(axes: Axes, quantity: str) -> None:
    if quantity in ("near_zero", "limited"):
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        return
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(bottom=max(low, high * LEAST))
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0) if high / low < 300 else (1.0,)))
    _plain_numbers(axes)


def _plain_numbers(axes: Axes) -> None:
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _drawn(curve: Sequence[float | None]) -> list[float]:
    """Errors within the range that is drawn."""
    return [min(max(x, LOWEST), HIGHEST) for x in _gaps(curve)]


def _gaps(curve: Sequence[float | None]) -> list[float]:
    return [math.nan if x is None else x for x in curve]
