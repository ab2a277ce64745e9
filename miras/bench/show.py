"""A benchmark's results as a table and as a drawing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from rich import box
from rich.table import Table

from miras.report.plots import FILE_STYLE, look
from miras.report.text import counted, three_digits

NOTHING = "-"


def title(results: dict[str, Any]) -> str:
    """What was measured and on what, in one line."""
    setup, machine = results["setup"], results["machine"]
    passes = "forward and backward" if setup["backward"] else "forward"
    times = ", ".join(f"{time:,}" for time in setup["times"])
    return (
        f"{passes} of a {setup['level']}, B {setup['batch']}, T {times}, D {setup['dim']}, H {setup['heads']}, "
        f"{setup['dtype']}, gates per {setup['gates']}; {machine['gpu'] or machine['cpu']}, "
        f"{counted(machine['threads'], 'thread')}{', compiled layers' if setup['compile'] else ''}"
    )


def tables(results: dict[str, Any]) -> list[Table]:
    """The rows, the machine's own speed and decoding, as far as they were measured."""
    found = [_rows_table(results)]
    if any(row["shares"] for row in results["rows"]):
        found.append(_shares_table(results))
    return [*found, *([_decode_table(results["decode"])] if results["decode"] else [])]


def speed_line(results: dict[str, Any]) -> str:
    """The machine's own speed, as lines of text."""
    return "\n".join(
        f"ceiling at T {int(time):,}: {speed['flops_per_second'] / 1e9:,.0f} GFLOP/s in a {results['setup']['dtype']} "
        f"matrix product, {speed['bytes_per_second'] / 1e9:,.1f} GB/s in a copy"
        for time, speed in results["speed"].items()
        if speed
    )


def _rows_table(results: dict[str, Any]) -> Table:
    rows = results["rows"]
    peers = list(dict.fromkeys(name for row in rows for name in row["against"]))
    noted = any(row["note"] for row in rows)
    heads = ["model", "chunk", "T", "ms", "spread", "first ms", "tokens/s"]
    heads += [f"x {peer}" for peer in peers] + ["of ceiling", "peak MB"] + ["note"] * noted
    table = Table(*heads, title=title(results), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in table.columns[1 : len(heads) - noted]:
        column.justify = "right"
    for row in rows:
        cells = [row["name"], row["chunk"], f"{row['time']:,}", _ms(row["ms"]), _percent(row["spread"])]
        cells += [_ms(row["first_ms"]), None if row["ms"] is None else f"{row['tokens_per_second']:,.0f}"]
        cells += [None if peer not in row["against"] else three_digits(row["against"][peer]) for peer in peers]
        cells += [_percent(row["of_ceiling"])]
        cells += [None if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:,.0f}"]
        table.add_row(*(NOTHING if cell is None else str(cell) for cell in cells), *[row["note"]] * noted)
    return table


def _shares_table(results: dict[str, Any]) -> Table:
    """Where the time goes, beside what the products would take by formula: of arithmetic, and of memory traffic."""
    rows = [row for row in results["rows"] if row["shares"]]
    heads = (
        "where the time goes",
        "chunk",
        "T",
        *rows[0]["shares"],
        "kFLOP/token",
        "kB/token",
        "ms by FLOP",
        "ms by byte",
    )
    table = Table(*heads, box=box.SIMPLE_HEAD, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        speed, tokens = results["speed"][str(row["time"])], results["setup"]["batch"] * row["time"]
        cells: list[str | None] = [NOTHING if row["chunk"] is None else str(row["chunk"]), f"{row['time']:,}"]
        cells += [_percent(part) for part in row["shares"].values()]
        flops, moved = row["useful_gflop"], row["traffic_gbyte"]
        cells += [_ms(None if x is None else 1e6 * x / tokens) for x in (flops, moved)]
        cells += [_ms(None if flops is None else 1e12 * flops / speed["flops_per_second"])]
        cells += [_ms(None if moved is None else 1e12 * moved / speed["bytes_per_second"])]
        table.add_row(row["name"], *(cell or NOTHING for cell in cells))
    return table


def _decode_table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table("decoding", "context", "ms/token", "spread", "state MB", "", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in table.columns[1:5]:
        column.justify = "right"
    for row in rows:
        size = NOTHING if row["state_bytes"] is None else three_digits(row["state_bytes"] / 1e6)
        cells = (_ms(row["ms"]) or NOTHING, _percent(row["spread"]) or NOTHING, size)
        table.add_row(row["name"], f"{row['context']:,}", *cells, row["note"])
    return table


def _ms(value: float | None) -> str | None:
    return None if value is None else three_digits(value)


def _percent(part: float | None) -> str | None:
    return None if part is None else f"{100 * part:.0f} %"


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw time and peak memory per token, over the sequence length or the chunk if there are several, as SVG."""
    rows = [row for row in results["rows"] if row["ms"] is not None]
    over = "time" if len(results["setup"]["times"]) > 1 else "chunk" if len(results["setup"]["chunks"]) > 1 else None
    batch = results["setup"]["batch"]
    panels = [("microseconds per token", {id(r): 1e6 / r["tokens_per_second"] for r in rows})]
    if any(row["peak_bytes"] is not None for row in rows):
        peaks = {id(r): r["peak_bytes"] / 1e3 / (batch * r["time"]) for r in rows if r["peak_bytes"] is not None}
        panels.append(("peak memory, kB per token", peaks))
    height = 3.4 if over else 1.1 + 0.22 * len(rows)
    with matplotlib.rc_context(FILE_STYLE):
        figure = Figure(figsize=(4.2 * len(panels), height + 0.6), layout="constrained")
        every = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (label, values) in zip(every, panels, strict=True):
            if over is None:
                _bars(axes, rows, values)
                axes.set_xlabel(label)
            else:
                _lines(axes, rows, values, over)
                axes.set_ylabel(label)
        if over:
            handles, labels = every[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=4)
        # Two lines: what is measured, and on what.
        figure.suptitle(title(results).replace("; ", "\n"), fontsize=7)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": "miras bench"})


def _bars(axes: Axes, rows: Sequence[dict[str, Any]], values: dict[int, float]) -> None:
    names = [row["name"] + ("" if row["chunk"] is None else f", {row['chunk']}") for row in rows]
    colours = ["#7F7F7F" if row["peer"] else look(0).colour for row in rows]
    axes.barh(names, [values.get(id(row), math.nan) for row in rows], color=colours, height=0.7)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)


def _lines(axes: Axes, rows: Sequence[dict[str, Any]], values: dict[int, float], over: str) -> None:
    """A line for each entry (and chunk, over sequence lengths); what has no chunk is a level line over chunks."""

    def group(row: dict[str, Any]) -> str:
        return row["name"] + (f", {row['chunk']}" if over == "time" and row["chunk"] is not None else "")

    places = sorted({row[over] for row in rows if row[over] is not None})
    for index, name in enumerate(dict.fromkeys(group(row) for row in rows)):
        own = [row for row in rows if group(row) == name and id(row) in values]
        shape = look(index)
        if not own:
            continue
        points = sorted((row[over] or 0, values[id(row)]) for row in own)
        if own[0][over] is None:
            points = [(place, points[0][1]) for place in places]
        marker = "" if own[0][over] is None else shape.marker
        axes.plot(*zip(*points, strict=True), label=name, color=shape.colour, linestyle=shape.dash, marker=marker)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(places))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.tick_params(axis="x", labelsize=7, labelrotation=30 if len(places) > 5 else 0)
    axes.set_xlabel("sequence length, tokens" if over == "time" else "chunk, tokens")
