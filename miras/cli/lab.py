"""`miras lab`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from miras.cli.app import main
from miras.errors import UsageError
from miras.process import set_threads


@main.command(
    epilog="Examples:\n\n  miras lab\n\n  miras lab outliers\n\n  miras lab outliers yaad titans --set rate=0.4"
    "\n\n  miras lab drift gated_deltanet my_rule.yaml --tau 100 --eta 0.5\n\n  miras lab --all"
)
def lab(
    scenario: Annotated[str | None, typer.Argument(help="What happens; without it, the list.")] = None,
    rules: Annotated[list[str] | None, typer.Argument(help="Variants or rule files; the scenario's own.")] = None,
    every: Annotated[bool, typer.Option("--all", help="All scenarios with their own rules.")] = False,
    eta: Annotated[float | None, typer.Option(help="Learning rate; searched for on held-out seeds.")] = None,
    tau: Annotated[float | None, typer.Option(help="Time constant of retention in tokens, alpha = e^(-1/tau).")] = None,
    gate: Annotated[
        list[str] | None, typer.Option(help="NAME=NUMBER, any gate of the rules, such as delta=0.3.")
    ] = None,
    setting: Annotated[list[str] | None, typer.Option("--set", help="NAME=NUMBER, a setting of the scenario.")] = None,
    search: Annotated[bool, typer.Option(help="Search for eta; else its initial value in a layer.")] = True,
    seeds: Annotated[int, typer.Option(help="How many streams.", min=1)] = 4,
    seed: Annotated[int, typer.Option(help="The first of them.", min=0)] = 0,
    out: Annotated[str, typer.Option(help="Folder for SCENARIO.json and SCENARIO.svg.")] = "runs/lab",
    threads: Annotated[int, typer.Option(help="Threads of PyTorch; its products are small.", min=1)] = 1,
) -> None:
    """See what a bias or a gate does: stream key-value pairs through memories, in seconds, with nothing trained around.

    Every rule is shown at the learning rate that suits it, found on other seeds than those shown.
    """
    set_threads(threads)
    from miras.lab.command import assignments, listed, made, visit
    from miras.lab.entry import ETA, LOG_ALPHA, log_alpha
    from miras.lab.scenarios import SCENARIOS

    if scenario is None and not every:
        typer.echo(listed())
        return
    if every and scenario is not None:
        raise UsageError(f"miras lab: got --all and {scenario}, expected one of them.")
    gates = assignments(gate or (), "--gate") | ({} if eta is None else {ETA: eta})
    gates |= {} if tau is None else {LOG_ALPHA: log_alpha(tau)}
    for name in [scenario] if scenario else list(SCENARIOS):
        stream = made(name, assignments(setting or (), "--set"))
        visit(stream, rules or (), gates, seeds, seed, search, Path(out))
