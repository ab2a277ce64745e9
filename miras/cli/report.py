"""`miras report`: a page of what was trained and measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from miras.cli.app import main


@main.command(
    epilog="Examples:\n\n  miras report runs/yaad runs/transformer\n\n  miras report runs/ --out sweep.html"
    "\n\n  miras eval runs/yaad --json > yaad.json; miras report runs/yaad yaad.json --title 'Yaad by length'"
)
def report(
    runs: Annotated[
        list[str], typer.Argument(help="Run folders, folders of them, and JSON files of results, in any order.")
    ],
    out: Annotated[str, typer.Option(help="The page.")] = "report.html",
    title: Annotated[str, typer.Option(help="Of the page; without it, the names of the models.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the sections as JSON instead of a page.")] = False,
) -> None:
    """One HTML page of any runs and results: tables, curves, heat maps, commands. It opens from the disk.

    Runs that share everything but the seed become one row with a mean and a 95 % interval.
    """
    from miras.report import report as run
    from miras.report.sections import merged, plain

    page = run(runs, title)
    if as_json:
        typer.echo(json.dumps({"sections": [plain(section) for section in merged(page.sections)]}, indent=2))
        return
    page.write(Path(out))
    typer.echo(f"The page is {out}.")
