"""`miras experiment`: the paper's tables and figures at a scale of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from miras.cli.app import Threads, main
from miras.process import set_threads


@main.command(
    epilog="Examples:\n\n  miras experiment\n\n  miras experiment language_modelling --jobs 2"
    "\n\n  miras experiment parts --seeds 1 --only 'first order' --only momentum --results experiments/results"
    "\n\n  miras experiment needle --scale paper"
)
def experiment(
    name: Annotated[str | None, typer.Argument(help="An experiment; without it they are listed.")] = None,
    scale: Annotated[str, typer.Option(help="laptop, gpu, or paper, of which the commands and costs are shown.")] = (
        "laptop"
    ),
    out: Annotated[str, typer.Option(help="Folder of all experiments; this one's is NAME-SCALE in it.")] = (
        "runs/experiments"
    ),
    seeds: Annotated[int | None, typer.Option(help="Seeds of each model, from 0 on.", min=1)] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="A model to keep, as often as needed; all unless given.", metavar="MODEL")
    ] = None,
    jobs: Annotated[int, typer.Option(help="Training runs side by side.", min=1)] = 1,
    results: Annotated[str | None, typer.Option(help="Folder for a copy of the results as small JSON.")] = None,
    threads: Threads = None,
) -> None:
    """The paper's experiments and some that nobody has done: equal data, tokens and size, learning rates searched.

    What is there is not done again, so a stopped command goes on where it stopped.
    """
    set_threads(threads)
    from miras.experiments import experiment as plan_of
    from miras.experiments.command import conduct, listing, on_paper

    if name is None:
        typer.echo(listing())
        return
    plan = plan_of(name, scale, seeds, only or ())
    if scale == "paper":
        typer.echo(on_paper(name, plan))
        return
    folder = Path(out) / f"{name}-{scale}"
    for table in conduct(name, scale, plan, folder, jobs, None if results is None else Path(results), only or ()):
        Console().print(table)
    typer.echo(f"The report is {folder / 'report.html'}, the numbers are in {folder / 'results.json'}.")
