"""`miras eval`: what a model is worth, on tasks of this library and of lm-evaluation-harness."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from miras.cli.app import Threads, main, set_threads
from miras.errors import UsageError


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
    task, models = (None, names or []) if lm_eval else ((names or [None])[0], (names or [])[1:])
    if lm_eval and (listed or settings or data):
        raise UsageError(
            "--lm-eval goes with --include-path, --limit and --json; the other options are of other tasks."
        )
    set_threads(threads)
    if lm_eval:
        _harness(lm_eval.split(","), models, include_path, limit, as_json)
    elif task is None or listed:
        typer.echo(_list())
    elif not models:
        typer.echo(_about(task))
    else:
        words = [*(settings or []), *([f"data={data}"] if data else [])]
        _compare(task, models, seeds, words, Path(out), again, as_json)


def _compare(name: str, models: Sequence[str], seeds: int, words: list[str], out: Path, again: bool, js: bool) -> None:
    from miras.evaluate.compare import compare, settle
    from miras.evaluate.tasks import TASKS, task

    if name not in TASKS and Path(name).exists():
        raise UsageError(f"miras eval {name}: the task comes first. Write for example: miras eval perplexity {name}")
    for word in words:
        if "=" not in word:
            raise UsageError(f"--set {word}: expected NAME=VALUE.")
    given, training = settle(task(name), dict(word.split("=", 1) for word in words))
    results = compare(name, given, training, models, seeds, out, again)
    if js:
        typer.echo(json.dumps(results, indent=2))
        return
    several = len(results["models"]) > 1
    measures = [m for m in _measures(results) if not several or m in given.measures]
    if several:
        for measure in measures:
            columns = {model: (model, measure) for model in results["models"]}
            _print(f"{name}: {_words(measure)}", given, results, columns, compared=True)
    else:
        (model,) = results["models"]
        _print(f"{name}: {model}", given, results, {_words(m): (model, m) for m in measures}, compared=False)
    typer.echo(_footnotes(results))


def _measures(results: dict[str, Any]) -> list[str]:
    row = next(iter(results["models"].values()))["rows"][0]
    return [name for name, value in row.items() if isinstance(value, dict)]


def _print(title: str, task: Any, results: dict[str, Any], columns: dict[str, tuple[str, str]], compared: bool) -> None:
    """A table, a line per level; columns: {heading: (model, measure)}."""
    table = Table(*map(_words, task.level), *columns, title=title)
    rows = {model: found["rows"] for model, found in results["models"].items()}
    for i, level in enumerate(next(iter(rows.values()))):
        cells = [rows[model][i][measure] for model, measure in columns.values()]
        best = None
        if compared:
            (measure,) = {measure for _, measure in columns.values()}
            best = (min if measure in task.less else max)(cell["mean"] for cell in cells)
        said = [f"[bold]{_cell(c)}[/bold]" if c["mean"] == best else _cell(c) for c in cells]
        table.add_row(*(f"{level[name]:,}" for name in task.level), *said)
    for column in table.columns:
        column.justify, column.no_wrap = "right", True
    Console().print(table)


def _cell(mean: dict[str, Any]) -> str:
    value, spread = mean["mean"], mean["interval"]
    said = (
        f"{value:,.0f}"
        if abs(value) >= 1e3 or (len(mean["values"]) == 1 and isinstance(value, int))
        else f"{value:.3f}"
    )
    return said if spread is None else f"{said} ± {spread:.3f}"


def _footnotes(results: dict[str, Any]) -> str:
    lines = [
        f"{model}: {m['parameters']:,} parameters, {m['state_bytes']:,} bytes of state, {m['seconds']:,.0f} s"
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
    from miras.evaluate.describe import about
    from miras.evaluate.scratch import ScratchConfig
    from miras.evaluate.tasks import SyntheticTask, task
    from miras.evaluate.tasks.settings import shown

    asked = task(name)
    text, meaning = about(type(asked))
    lines = [text, "", "Settings (--set NAME=VALUE):"]
    lines += [f"  {n}={shown(getattr(asked, n))}\n      {said}" for n, said in meaning.items()]
    if isinstance(asked, SyntheticTask):
        lines.append("\nSettings of the training:")
        plain = ScratchConfig()
        for n, said in about(ScratchConfig)[1].items():
            if n not in ("model", "seed"):
                lines.append(f"  {n}={shown(getattr(plain, n))}\n      {said}")
    return "\n".join(lines)


def _harness(tasks: Sequence[str], models: Sequence[str], include: str | None, limit: int | None, js: bool) -> None:
    if not models:
        raise UsageError(f"--lm-eval {','.join(tasks)}: say of which model, such as runs/yaad.")
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError("--lm-eval needs the package lm-eval. Write: pip install 'miras[eval]'")
    from miras.evaluate.harness import harness, table

    results = harness([name.strip() for name in tasks], models, include, limit)
    if js:
        typer.echo(json.dumps({model: found["results"] for model, found in results.items()}, indent=2))
        return
    for model, found in results.items():
        typer.echo(f"{model}\n{table(found)}")
