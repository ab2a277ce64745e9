"""`miras list`, `miras explain`: the known models and the axes."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from miras.cli.app import main


@main.command(name="list", epilog="Examples:\n\n  miras list\n\n  miras list --axes\n\n  miras list --json")
def list_variants(
    of_axes: Annotated[bool, typer.Option("--axes", help="What exists on each axis, instead of the variants.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """The variants: four choices each, the update, the engines, and what each is checked against."""
    from miras.evaluate.describe import AXES, axes, rows

    table = axes() if of_axes else rows()
    if as_json:
        typer.echo(json.dumps(table, indent=2))
        return
    if isinstance(table, dict):
        typer.echo("\n\n".join(_axis(axis, parts) for axis, parts in table.items()))
        return
    grid = Table("name", *AXES, "engine", "checked against", "error", box=box.SIMPLE_HEAD, pad_edge=False)
    for row in table:
        error = "" if row["error"] is None else f"{row['error']:.0e}"
        oracle = row["oracle"] or "nothing yet"
        grid.add_row(row["name"], *(row[axis] for axis in AXES), row["engines"][0], oracle, error)
    for column in grid.columns:
        column.overflow = "fold"
    # Where there is no terminal, rich would guess 80 columns and break the lines for nobody.
    Console(width=None if sys.stdout.isatty() else 220).print(grid)
    typer.echo(
        "error: largest relative deviation of outputs, memory and all gradients from the implementation it is checked "
        "against, in float64."
        "\nOne as formulas, with gates and sizes: miras explain NAME. Updates and all engines: miras list --json"
        "\nWhat else there is on each axis: miras list --axes"
    )


def _axis(name: str, parts: list[dict[str, Any]]) -> str:
    """An axis as lines: each class with its arguments, below it its formula."""
    lines = [name]
    for part in parts:
        arguments = ", ".join(f"{key}={value!r}" for key, value in part["arguments"].items())
        lines += [f"  {part['name']}({arguments})", f"      {part['formula']}"]
    return "\n".join(lines)


@main.command(epilog="Examples:\n\n  miras explain yaad\n\n  miras explain memora --heads 16 --head-dim 64 --chunk 64")
def explain(
    name: Annotated[str, typer.Argument(help="A variant, a pattern of them, or a .yaml / .json file with a rule.")],
    heads: Annotated[int, typer.Option(help="Heads of a layer.")] = 4,
    head_dim: Annotated[int, typer.Option(help="Size of each head.")] = 32,
    chunk: Annotated[int | None, typer.Option(help="Tokens per chunk.")] = None,
) -> None:
    """A variant as formulas: the update, the axes, the gates, what it stores, and which engine runs it."""
    from miras.evaluate.describe import explanation
    from miras.train.config import load_config

    config = load_config(name, {"layers": max(4, name.count(",") + 1), **({} if chunk is None else {"chunk": chunk})})
    mixers = dict.fromkeys(config.mixers)
    typer.echo("\n\n".join(explanation(config.model, mixer, heads, head_dim) for mixer in mixers))
