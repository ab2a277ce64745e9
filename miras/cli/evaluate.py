"""`miras eval`: what a model is worth, on tasks of this library and of lm-evaluation-harness."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from miras.cli.app import Threads, main
from miras.errors import UsageError
from miras.process import set_threads

if TYPE_CHECKING:
    from miras.evaluate.tasks.base import Row, Task


@main.command(
    name="eval",
    epilog="Examples:\n\n  miras eval --list\n\n  miras eval perplexity runs/yaad --data book.txt --set part=all"
    "\n\n  miras eval passkey runs/yaad runs/transformer --set lengths=1024,4096"
    "\n\n  miras eval mqar yaad gated_deltanet my_rule.yaml --seeds 3 --set dim=128 --set test=[256,64],[512,128]"
    "\n\n  miras eval --lm-eval lambada_openai,piqa runs/yaad"
    "\n\n  miras eval --lm-eval my_task --include-path my_tasks/ runs/yaad --json",
)
def evaluate(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TASK] [MODEL]...",
            help="A task, then run folders, or, for a task that is learned from nothing, variants or rule files."
            " A task alone tells about itself.",
        ),
    ] = None,
    listed: Annotated[bool, typer.Option("--list", help="Show the tasks.")] = False,
    seeds: Annotated[int, typer.Option(help="How many seeds, 0 and up.", min=1)] = 1,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Change the task; as often as needed.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="The same as --set data=; as for miras train.")] = None,
    out: Annotated[str, typer.Option(help="Folder of results; what is in it is not measured again.")] = "runs/eval",
    again: Annotated[bool, typer.Option("--again", help="Measure what is there, too.")] = False,
    lm_eval: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="Tasks of lm-evaluation-harness; paper: the paper's nine.")
    ] = None,
    include_path: Annotated[str | None, typer.Option(help="With --lm-eval: a folder of .yaml tasks.")] = None,
    limit: Annotated[int | None, typer.Option(help="With --lm-eval: examples of a task, at most.", min=1)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    threads: Threads = None,
) -> None:
    """Ask models a task and compare them: means and 95 % intervals over seeds, the best in bold."""
    words, given = [*(settings or []), *([f"data={data}"] if data else [])], names or []
    if lm_eval and (listed or words):
        raise UsageError("--lm-eval goes with --include-path, --limit and --json, not with settings of other tasks.")
    set_threads(threads)
    if lm_eval:
        _harness(lm_eval.split(","), given, include_path, limit, as_json)
    elif listed or not given:
        typer.echo(_list())
    elif len(given) == 1:
        typer.echo(_about(given[0]))
    else:
        _compare(given[0], given[1:], seeds, words, Path(out), again, as_json)


def _compare(name: str, models: list[str], seeds: int, words: list[str], out: Path, again: bool, as_json: bool) -> None:
    from miras.evaluate.compare import compare, settle

    for word in words:
        if "=" not in word:
            raise UsageError(f"--set {word}: expected NAME=VALUE.")
    task, training = settle(_task(name), dict(word.split("=", 1) for word in words))
    results = compare(name, task, training, models, seeds, out, again)
    if as_json:
        typer.echo(json.dumps(results, indent=2))
        return
    rows = {model: found["rows"] for model, found in results["models"].items()}
    first = next(iter(rows))
    if len(rows) > 1:
        for measure in task.measures:
            best = min if measure in task.less else max
            _print(f"{name}: {_words(measure)}", task, rows, {model: (model, measure) for model in rows}, best)
    else:
        columns = {_words(m): (first, m) for m, value in rows[first][0].items() if isinstance(value, dict)}
        _print(f"{name}: {first}", task, rows, columns)
    typer.echo(_footnotes(results))


def _task(name: str) -> Task:
    from miras.evaluate.tasks import TASKS, task

    if name not in TASKS and Path(name).exists():
        raise UsageError(f"miras eval {name}: the task comes first. Write for example: miras eval perplexity {name}")
    return task(name)


def _print(
    title: str,
    task: Task,
    rows: dict[str, list[Row]],
    columns: dict[str, tuple[str, str]],
    best: Callable | None = None,
) -> None:
    """A table with a line per level; columns: {heading: (model, measure)}; best: picks the mean that is made bold."""
    table = Table(*map(_words, task.level), title=title)
    for heading in columns:
        table.add_column(heading, overflow="fold")
    for i, level in enumerate(next(iter(rows.values()))):
        cells = [rows[model][i][measure] for model, measure in columns.values()]
        means = [cell["mean"] for cell in cells]
        winner = best(means) if best and len(set(means)) > 1 else None
        said = [f"[bold]{_cell(c)}[/bold]" if c["mean"] == winner else _cell(c) for c in cells]
        table.add_row(*(x if isinstance(x := level[name], str) else f"{x:,}" for name in task.level), *said)
    for column in table.columns:
        column.justify = "right"
    # Where there is no terminal, rich would guess 80 columns and break the lines for nobody.
    Console(width=None if sys.stdout.isatty() else 220).print(table)


def _cell(mean: dict[str, Any]) -> str:
    value, spread = mean["mean"], mean["interval"]
    said = f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1e3 else f"{value:.3f}"
    return said if spread is None else f"{said} ± {spread:.3f}"


def _footnotes(results: dict[str, Any]) -> str:
    lines = [
        f"{model}: {m['parameters']:,} parameters, {m['state_bytes']:,} bytes of state, {m['seconds']:,.0f} s"
        + (f"; {len(m['diverged'])} of {results['seeds']} seeds diverged" if m["diverged"] else "")
        for model, m in results["models"].items()
    ]
    if results["seeds"] > 1:
        lines.append(f"Means over {results['seeds']} seeds with 95 % intervals (Student's t).")
    return "\n".join(lines)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _list() -> str:
    """The tasks, a line each."""
    from miras.evaluate.tasks import TASKS, LanguageTask

    lines = []
    for heading, language in (("Of a trained model", True), ("Learned from nothing", False)):
        lines.append(f"{heading}:")
        for name, task in TASKS.items():
            if isinstance(task, LanguageTask) == language:
                made = "" if task == type(task)() else f" {task}"
                lines.append(f"  {name:<15} {task.formula}{made}")
        lines.append("")
    return "\n".join([*lines, "A task's settings: miras eval TASK. Tasks of lm-evaluation-harness: --lm-eval NAME."])


def _about(name: str) -> str:
    """A task's own words, and its settings with their defaults."""
    from miras.evaluate.compare import training_settings
    from miras.evaluate.describe import about
    from miras.evaluate.scratch import ScratchConfig
    from miras.evaluate.tasks import SyntheticTask
    from miras.evaluate.tasks.settings import shown

    asked = _task(name)
    text, meaning = about(type(asked))
    lines = [text, "", "Settings (--set NAME=VALUE):"]
    lines += [f"  {n}={shown(getattr(asked, n))}\n      {said}" for n, said in meaning.items()]
    if isinstance(asked, SyntheticTask):
        _, meaning = about(ScratchConfig)
        lines.append("\nSettings of the training:")
        lines += [f"  {n}={default}\n      {meaning[n]}" for n, default in training_settings().items()]
    return "\n".join(lines)


def _harness(tasks: list[str], models: list[str], include: str | None, limit: int | None, as_json: bool) -> None:
    if not models:
        raise UsageError(f"--lm-eval {','.join(tasks)}: say of which model, such as runs/yaad.")
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError("--lm-eval needs the package lm-eval. Write: pip install 'miras[eval]'")
    from miras.evaluate.harness import harness, table

    results = harness([name.strip() for name in tasks], models, include, limit)
    if as_json:
        typer.echo(json.dumps({model: found["results"] for model, found in results.items()}, indent=2))
        return
    for model, found in results.items():
        typer.echo(f"{model}\n{table(found)}")
