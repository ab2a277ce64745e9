"""`miras lab`: from what was asked for to a table and two files."""

from __future__ import annotations

import dataclasses
import shlex
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from miras.errors import UsageError, near
from miras.lab.compare import compare
from miras.lab.entry import entry
from miras.lab.scenarios import SCENARIOS
from miras.lab.show import LEGEND, columns, plot, rows
from miras.lab.stream import Scenario
from miras.train.files import write_json


def visit(
    scenario: Scenario,
    rules: Sequence[str],
    gates: Mapping[str, float],
    seeds: int,
    seed: int,
    search: bool,
    out: Path,
) -> dict[str, Any]:
    """Measure, print and write one scenario; the arguments are those of the command line.

    Returns:
        The results, as in the JSON file.

    Raises:
        UsageError: an unknown rule, or a gate that none of the rules has.
    """
    entries = [entry(name) for name in rules] or list(scenario.entries())
    known = {g.name for e in entries for g in e.rule.gates if not g.vector}
    for name in gates:
        if name not in known:
            raise UsageError(f"--gate {name}: none of the rules has that gate." + near(name, sorted(known)))
    start = time.perf_counter()
    results = compare(scenario, [e.with_gates(gates) for e in entries], seeds, seed, search)
    results |= {"command": shlex.join(["miras", *sys.argv[1:]]), "seconds": round(time.perf_counter() - start, 1)}
    out.mkdir(parents=True, exist_ok=True)
    files = [out / f"{scenario.name}{ending}" for ending in (".json", ".svg")]
    write_json(files[0], results)
    plot(results, files[1])
    title = f"{scenario.name}: {scenario.shows}\n{results['tokens']:,} tokens, {seeds} seeds"
    table = Table(*columns(results), title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows(results):
        table.add_row(*row)
    # Where there is no terminal, rich would guess 80 columns and break the lines for nobody.
    Console(width=None if sys.stdout.isatty() else 220).print(table)
    print(f"{LEGEND}\n{textwrap.fill('Look for: ' + scenario.look, 120)}")
    print(f"Written: {files[0]} and {files[1]}.\n")
    return results


def made(name: str, settings: Mapping[str, float]) -> Scenario:
    """The scenario of a name, with some of its fields set.

    Raises:
        UsageError: an unknown name or field, or a value that is no whole number where one is needed.
    """
    if name not in SCENARIOS:
        raise UsageError(f"no scenario is called {name!r}." + near(name, list(SCENARIOS)))
    fields = {f.name: f.type for f in dataclasses.fields(SCENARIOS[name])}
    given: dict[str, Any] = {}
    for key, value in settings.items():
        if key not in fields:
            raise UsageError(f"--set {key}: scenario {name} has no such setting." + near(key, fields))
        if fields[key] == "int" and value != int(value):
            raise UsageError(f"--set {key}={value:g}: expected a whole number.")
        given[key] = int(value) if fields[key] == "int" else value
    return SCENARIOS[name](**given)


def assignments(words: Sequence[str], option: str) -> dict[str, float]:
    """`NAME=NUMBER` words as a dict.

    Raises:
        UsageError: a word of another form.
    """
    found = {}
    for word in words:
        name, _, value = word.partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            raise UsageError(f"{option} {word}: expected NAME=NUMBER, such as {option} rate=0.3.") from None
    return found


def listed() -> str:
    """The scenarios, a line each."""
    wide = max(map(len, SCENARIOS))
    lines = [f"{name:<{wide}}  {cls.shows}" for name, cls in SCENARIOS.items()]
    settings = "Their settings and what to look for: docs/lab.md. One of them: miras lab outliers"
    return "\n".join([*lines, "", settings])
