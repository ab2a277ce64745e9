"""The application that every command joins, and what they share."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from miras.errors import MirasError, UsageError

# Of --help: first what one starts with.
ORDER = ("demo", "train", "eval", "generate", "inspect", "report", "experiment", "list", "explain", "lab", "bench")


# Names of glibc's malloc.h.
TRIM_THRESHOLD, MMAP_MAX = -1, -4


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


def keep_memory() -> None:
    """Have the C library keep freed memory for the next tensors, which it else gives back and takes anew, empty.

    Tensors beyond 32 MB are concerned: it is a third of the time of a long sequence (docs/performance.md). Other C
    libraries than glibc are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(TRIM_THRESHOLD, -1)
        mallopt(MMAP_MAX, 0)


def set_threads(count: int | None) -> None:
    """Settings of the process that come before its first tensors, those of threads before the first import of torch."""
    keep_memory()
    # Threads that wait by spinning make a step 50 times slower as soon as another process wants the cores.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if count is not None:
        os.environ["OMP_NUM_THREADS"] = str(count)
        import torch

        torch.set_num_threads(count)


def lengths(text: str, option: str) -> list[int]:
    """Whole numbers above 0 that an option lists, separated by commas."""
    words = text.split(",")
    if not all(word.strip().isdecimal() and int(word) for word in words):
        raise UsageError(f"{option} {text}: expected whole numbers separated by commas, such as 256,1024,4096.")
    return [int(word) for word in words]
