"""`miras inspect`: what happens inside a trained model."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from miras.cli.app import Threads, lengths, main
from miras.errors import UsageError
from miras.process import set_threads


@main.command(
    epilog="Examples:\n\n  miras inspect runs/yaad --text book.txt"
    "\n\n  miras inspect runs/yaad --text book.txt --recall 'the code is 7 3 9 1' --distances 16,64,256,1024"
)
def inspect(
    model: Annotated[str, typer.Argument(help="Run folder or model folder.")],
    text: Annotated[str, typer.Option(help="File of UTF-8 text to read.")],
    limit: Annotated[int, typer.Option(help="Tokens of it to show, at most.", min=2)] = 1000,
    recall: Annotated[
        str | None, typer.Option(help="A span of text: how much less it costs the second time, over distance.")
    ] = None,
    distances: Annotated[
        str | None, typer.Option(help="Tokens between the two; as many of 16,64,256,1024,4096 as the text is long.")
    ] = None,
    out: Annotated[str, typer.Option(help="The page; the numbers stand beside it as .json.")] = "inside.html",
    threads: Threads = None,
) -> None:
    """Each token of a text as the memories see it: surprise, learning rate, retention, extreme events, change.

    It reads by the definition of the model, token by token, which is slower than its engines are.
    """
    reach = lengths(distances, "--distances") if distances is not None else []
    if reach and recall is None:
        raise UsageError(f"--distances {distances}: are those of --recall; write --recall 'a span of text' too.")
    if Path(out).suffix != ".html":
        raise UsageError(f"--out {out}: expected a name that ends in .html; the numbers get the same with .json.")
    set_threads(threads)
    from miras.inside import inspect as run

    words = ["miras", "inspect", model, "--text", text, "--limit", str(limit)]
    words += ["--recall", recall] if recall is not None else []
    words += ["--distances", distances] if distances is not None else []
    run(model, text, limit, recall, reach, Path(out), shlex.join(words))
    typer.echo(f"The page is {out}, the numbers are in {Path(out).with_suffix('.json')}.")
