"""The application that every command joins, and what they share."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from miras.errors import MirasError, UsageError

# Of --help: first what one starts with.
ORDER = ("demo", "train", "eval", "generate", "inspect", "report", "experiment", "list", "explain", "lab", "bench")


class _Commands(TyperGroup):
    """Commands whose deliberate failures are one paragraph and an exit code, not a traceback."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=ORDER.index)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except MirasError as error:
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as stop:
            typer.echo("\nStopped.", err=True)
            raise typer.Exit(1) from stop


main = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Sequence layers as associative memories that learn while they read.",
    epilog="Begin with [bold]miras demo[/bold], or [bold]miras list[/bold] and [bold]miras train yaad[/bold].",
)

Threads = Annotated[int | None, typer.Option(help="Threads of PyTorch; all cores unless given.", min=1)]


def lengths(text: str, option: str) -> list[int]:
    """Whole numbers above 0 that an option lists, separated by commas."""
    words = text.split(",")
    if not all(word.strip().isdecimal() and int(word) for word in words):
        raise UsageError(f"{option} {text}: expected whole numbers separated by commas, such as 256,1024,4096.")
    return [int(word) for word in words]
